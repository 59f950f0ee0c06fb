"""Which PEFT adapters are sums of low-rank products, and which are not."""

from __future__ import annotations

import dataclasses

from peft import LoraConfig, PeftConfig

from mergekit_monosoup.errors import UnsupportedAdapterError

# Initialisations that also take a part out of the base weights, so that c B A alone is not the update.
_MUTATING_INITS = ("pissa", "corda", "olora", "loftq", "lora_ga")
# Tagged as variants by peft, but plain c B A in what they compute.
_LINEAR_VARIANTS = frozenset({"velora_config"})
# Variants by the names that peft gave them before it tagged their fields.
_KNOWN_VARIANTS = frozenset(
    {"use_dora", "use_qalora", "use_bdlora", "alora_invocation_tokens", "arrow_config", "monteclora_config"}
)


def refuse_nonlinear(config: PeftConfig, source: str) -> LoraConfig:
    """Return the configuration of an adapter whose updates are c B A.

    Args:
        config: as peft read it.
        source: folder or id, for the message.

    Raises:
        UnsupportedAdapterError: another PEFT method, or a variant of LoRA that is not linear.
    """
    if type(config) is not LoraConfig:
        kind = getattr(config.peft_type, "value", config.peft_type)
        raise UnsupportedAdapterError(
            f"adapter {source} is of PEFT type {kind}; only LORA stores its updates as two factors. "
            "Merge it into its base with peft (merge_and_unload) and edit the merged model"
        )
    for variant in _variants(config):
        raise UnsupportedAdapterError(
            f"adapter {source} sets {variant}, and its updates are not c B A; merge it into its base with "
            "peft (merge_and_unload) and edit the merged model"
        )
    init = str(config.init_lora_weights).lower()
    if init.startswith(_MUTATING_INITS):
        raise UnsupportedAdapterError(
            f"adapter {source} was initialised by {init!r}, which changes the base weights on loading; save "
            "it as plain LoRA first (peft: save_pretrained with path_initial_model_for_weight_conversion)"
        )
    return config


def _variants(config: LoraConfig) -> list[str]:
    tagged = {f.name for f in dataclasses.fields(config) if f.metadata.get("is_lora_variant")}
    names = (tagged | _KNOWN_VARIANTS) - _LINEAR_VARIANTS
    return sorted(name for name in names if getattr(config, name, None))
