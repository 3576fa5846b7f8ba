"""Frozen weights of 4 or 8 bits, for a base that only LoRA and heads train on.

    nf4    16 levels, even in a normal law's mass; a scale for each 64 weights, itself of 8 bits (QLoRA, Dettmers et
           al. 2023)
    int8   a scale for each row; inputs, too, have 8 bits, outlying features apart (LLM.int8(), Dettmers et al. 2022)
    fp8    e4m3, no scales

Every linear layer is quantised but the last norm's and the projection after it, from which students' own norm and
heads start; with fp8, the layers that diffusers holds to need more, too. Products with nf4 and fp8 weights are of
the base's own dtype. LoRA is added afterwards and stays as it is.

    bits per weight    nf4 4.1    int8, fp8 8

fp8 restores a layer's weights while the layer runs, and autograd would keep what was restored until the backward
pass: recompute activations (`checkpoint_gradients`) when training on it.
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import torch
from torch import nn

Quantisation = Literal["none", "nf4", "int8", "fp8"]

WHOLE = ("norm_out", "proj_out")
"""What is never quantised, by its name in the transformer itself; FLUX.1's single blocks have a proj_out, too."""

OUTLIER = 6.0
"""Inputs beyond it are not of 8 bits, as published for LLM.int8()."""


def loading_options(kind: Quantisation, dtype: torch.dtype) -> dict[str, Any]:
    """What diffusers' `from_pretrained` is told so that weights of `dtype` are quantised as they are read.

    That needs a GPU, and spares its memory all but the quantised weights; elsewhere it is nothing, and `quantise`
    does it all afterwards. `ImportError` without bitsandbytes.
    """
    if kind not in ("nf4", "int8") or not torch.cuda.is_available():
        return {}
    from diffusers import BitsAndBytesConfig

    _bitsandbytes(kind)
    config: Any = BitsAndBytesConfig
    if kind == "nf4":
        options = {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_use_double_quant": True,
            "bnb_4bit_compute_dtype": dtype,
        }
    else:
        options = {"load_in_8bit": True, "llm_int8_threshold": OUTLIER}
    # diffusers compares the last part of a name, and so leaves more alone than is meant: `quantise` makes up for it.
    return {"quantization_config": config(**options, llm_int8_skip_modules=list(WHOLE))}


def quantise(transformer: Any, kind: Quantisation) -> Any:
    """The transformer, frozen, with its linear layers quantised in place, on the device where they lie.

    What is quantised already stays. transformer: of diffusers, before any LoRA.  kind: "none" changes nothing.
    Raises `ValueError` for a transformer that has LoRA, `ImportError` without bitsandbytes.
    """
    if kind == "none":
        return transformer
    if getattr(transformer, "peft_config", None):
        raise ValueError(f"a base is quantised before it gets LoRA, got one with {', '.join(transformer.peft_config)}")
    transformer.requires_grad_(False)
    if kind == "fp8":
        skipped = (*(f"^{name}" for name in WHOLE), *(transformer._skip_layerwise_casting_patterns or ()))
        transformer.enable_layerwise_casting(
            storage_dtype=torch.float8_e4m3fn,
            compute_dtype=transformer.proj_out.weight.dtype,
            skip_modules_pattern=skipped,
        )
        return transformer
    library = _bitsandbytes(kind)
    dtype = transformer.proj_out.weight.dtype
    for name, module in list(transformer.named_modules()):
        if type(module) is nn.Linear and name.split(".")[0] not in WHOLE:
            own = _four_bits(library, module, dtype) if kind == "nf4" else _eight_bits(library, module)
            parent, _, last = name.rpartition(".")
            setattr(transformer.get_submodule(parent), last, own.train(module.training))
    for module in transformer.modules():
        if isinstance(module, library.nn.Linear4bit):
            # Its fast product for CPUs, which it switches to for good when asked without a graph, has no gradient.
            module.support_avx512bf16_for_cpu = False
    # What peft chooses its layers by.
    transformer.is_loaded_in_4bit, transformer.is_loaded_in_8bit = kind == "nf4", kind == "int8"
    return transformer


def _four_bits(library: Any, linear: nn.Linear, dtype: torch.dtype) -> nn.Module:
    own = library.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta"
    )
    own.weight = library.nn.Params4bit(linear.weight.data, quant_type="nf4", compress_statistics=True, module=own)
    return _placed(own, linear)


def _eight_bits(library: Any, linear: nn.Linear) -> nn.Module:
    own = library.nn.Linear8bitLt(
        linear.in_features,
        linear.out_features,
        bias=False,
        has_fp16_weights=False,
        threshold=OUTLIER,
        device="meta",
    )
    # On its way off the CPU, a weight is quantised; "to" the CPU counts, too.
    own.weight = library.nn.Int8Params(linear.weight.data.cpu(), requires_grad=False)
    return _placed(own, linear)


def _placed(own: nn.Module, linear: nn.Linear) -> nn.Module:
    """The layer with its weight quantised, which happens as it is moved, and the bias."""
    own.to(linear.weight.device)
    own.bias = linear.bias
    return own


def _bitsandbytes(kind: Quantisation) -> Any:
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            f'quantise = "{kind}" needs bitsandbytes ({error}): run `pip install "pitools[scale]"`'
        ) from error
    # Of bf16 inputs, int8 layers warn at every call.
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    return bitsandbytes
