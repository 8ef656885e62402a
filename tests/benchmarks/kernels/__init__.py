"""How fast the kernels are on a GPU, beside everything else that computes the same.

    python -m tests.benchmarks.kernels --out kernels.json --plot kernels.png
    python -m tests.benchmarks.kernels --op attention --sizes some

Every figure is the median of `triton.testing.do_bench`; what is compared is measured in one run, one after the other
on the same tensors, and compared with the composite before it is timed. Bandwidth counts what must be read and
written once; a copy of as many bytes is measured beside it. Without a GPU the command says so and exits with 2.

    problems.py   what is measured: shapes, and every implementation of each
    measure.py    checking, timing, and the record of a run
    picture.py    achieved bandwidth against size
"""
