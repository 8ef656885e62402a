"""What a checkpoint's folder holds: the class that its config.json names, and how that is exported."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fxfuse.errors import FxfuseError
from fxfuse.pretrained.quiet import quiet

Kind = Literal["decoder", "encoder"]

ADAPTER = "adapter_config.json"
FACTORY = "write a factory function that returns (model, args, kwargs, dynamic_shapes), and name it as SOURCE"

_OTHER_INPUTS = {"pixel_values", "pixel_values_videos", "input_features", "input_values"}
"""Names of inputs (`main_input_name`) that are images, video or audio. A model that takes one of them beside input_ids
is multimodal."""
_OTHER_PARTS = ("vision", "image", "video", "audio", "speech")
"""Words in the name of a part of a configuration; they say that it is of a tower for something other than text."""


@dataclass(frozen=True)
class Holds:
    """A model that can be loaded whole and exported."""

    source: str
    """The folder, or the name of a model on the Hub."""
    config: Any
    cls: Any
    """The class of transformers that `architectures` names."""
    kind: Kind
    """A decoder generates text, and is exported with its cache; an encoder is exported as it is."""
    trust_remote_code: bool = False

    @property
    def generates(self) -> bool:
        return self.kind == "decoder"


def is_pretrained(source: str) -> bool:
    """Is SOURCE the folder of a checkpoint, as transformers or peft write it?"""
    return any((Path(source) / name).is_file() for name in ("config.json", ADAPTER))


def look(source: str, *, trust_remote_code: bool = False, local: bool = True) -> Holds:
    """What `source` holds; no weight is read.

    Args:
        source: a folder, or the name of a model on the Hub unless `local`.
        trust_remote_code: import the class from code that comes with the checkpoint.

    Raises:
        FxfuseError: transformers is not installed; no configuration, or one without a class; an adapter without its
            model; an encoder–decoder or a multimodal model, which is several graphs.
    """
    try:
        from transformers import AutoConfig
    except ImportError as error:
        raise FxfuseError("transformers is not installed", hint="pip install 'fxfuse[transformers]'") from error
    if (Path(source) / ADAPTER).is_file():
        raise FxfuseError(
            "the folder holds an adapter (adapter_config.json), which is exported as part of its model",
            where=source,
            hint="merge it: PeftModel.from_pretrained(model, FOLDER).merge_and_unload().save_pretrained(MERGED), "
            "then export MERGED",
        )
    try:
        with quiet():
            config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, local_files_only=local)
    except Exception as error:  # whatever json, the Hub's client or a configuration's checks raise
        raise FxfuseError(f"the configuration cannot be read: {_brief(error)}", where=source) from error
    cls = _class_of(config, source, trust_remote_code)
    kind = _kind(cls, config, source)
    return Holds(source, config, cls, kind, trust_remote_code)


def _class_of(config: Any, source: str, trust_remote_code: bool) -> Any:
    import transformers

    names = list(dict.fromkeys(config.architectures or []))
    if not names:
        raise FxfuseError(
            "config.json names no class (architectures): what the weights are is not known",
            where=source,
            hint=f'add it, as in "architectures": ["{_example(config)}"]',
        )
    if len(names) > 1:
        raise FxfuseError(
            f"config.json names several classes: {', '.join(names)}",
            where=source,
            hint="leave the one in architectures that is to be exported",
        )
    (name,) = names
    remote = getattr(config, "auto_map", None) or {}
    if trust_remote_code and "AutoModelForCausalLM" in remote:
        return transformers.AutoModelForCausalLM
    cls: Any = getattr(transformers, name, None)
    if not hasattr(cls, "from_pretrained") or not hasattr(cls, "config_class"):
        own = "comes with code of its own, which is not run" if remote else "is of another version or package"
        raise FxfuseError(
            f"transformers {transformers.__version__} has no class {name}, which config.json names: it {own}",
            where=source,
            hint=FACTORY,
        )
    if not _belongs(cls, config):
        raise FxfuseError(
            f"config.json names the class {name}, which takes a {cls.config_class.__name__}, but is the configuration "
            f"of {config.model_type}",
            where=source,
            hint="make model_type and architectures agree with the weights",
        )
    return cls


def _belongs(cls: Any, config: Any) -> bool:
    """Is this a configuration that the class takes, or one with a part that is? Some model types share another's
    classes."""
    from transformers.models.auto import modeling_auto

    if isinstance(config, cls.config_class) or cls.config_class in config.sub_configs.values():
        return True
    tables = (getattr(modeling_auto, name) for name in dir(modeling_auto) if name.endswith("_MAPPING_NAMES"))
    return any(cls.__name__ in _listed(table.get(config.model_type)) for table in tables)


def _listed(names: Any) -> tuple[str, ...]:
    return tuple(names) if isinstance(names, (tuple, list)) else (names,)


def _example(config: Any) -> str:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES

    for table in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_MAPPING_NAMES):
        if config.model_type in table:
            return _listed(table[config.model_type])[0]
    return "LlamaForCausalLM"


def _kind(cls: Any, config: Any, source: str) -> Kind:
    """How a class is exported, by its inputs and its configuration's parts.

    Raises:
        FxfuseError: it would need several graphs, or takes inputs for which no samples are known.
    """
    name = config.architectures[0]
    taken = set(inspect.signature(cls.forward).parameters) if hasattr(cls, "forward") else set()
    pairs = any(parameter.startswith("decoder_input_") for parameter in taken)
    if pairs or (config.is_encoder_decoder and cls.can_generate() and not _is_causal(cls)):
        raise FxfuseError(
            f"{name} is an encoder–decoder: its graphs are several, which fxfuse does not write yet",
            where=source,
            hint="fxfuse.integrations.transformers exports it stage by stage: export_for_generation",
        )
    if not taken:  # an auto class, of code that comes with the checkpoint
        return "decoder"
    # What transformers calls the modalities of a class is inherited by the text model of a multimodal one.
    parts = sorted(cls.config_class.sub_configs or ())
    towers = [part for part in parts if any(word in part for word in _OTHER_PARTS)]
    modalities = _listed(getattr(cls, "input_modalities", "text"))
    others = sorted(taken & _OTHER_INPUTS)
    if towers or ("text_config" in parts and len(modalities) > 1) or ("input_ids" in taken and others):
        said = ", ".join([*others, *parts])
        raise FxfuseError(
            f"{name} is multimodal ({said}): its towers are graphs of their own, which fxfuse does not write yet",
            where=source,
            hint="fxfuse.integrations.transformers exports it stage by stage: export_for_generation",
        )
    if cls.can_generate():
        return "decoder"
    if cls.main_input_name not in ("input_ids", "pixel_values") or cls.main_input_name not in taken:
        raise FxfuseError(
            f"{name} takes {cls.main_input_name}, for which no sample inputs are known",
            where=source,
            hint=FACTORY,
        )
    return "encoder"


def _is_causal(cls: Any) -> bool:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return any(cls.__name__ in _listed(names) for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())


def _brief(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
