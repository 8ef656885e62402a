"""A folder that generates text: its graphs and weights, its manifest, and what other runtimes want beside them."""
