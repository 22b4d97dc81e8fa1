"""kvquant inside lm-evaluation-harness: the model ``kvquant``, any task of the harness with a quantised cache.

The harness finds models by import alone, so its own command does not know this one. The same command with the model is

    python -m kvquant.integrations.lm_eval run --model kvquant \
        --model_args pretrained=NAME,backend=hqq,nbits=2 --tasks TASK

and in Python importing this module is enough:

    import kvquant.integrations.lm_eval
    import lm_eval

    lm_eval.simple_evaluate(model="kvquant", model_args="pretrained=NAME,backend=hqq,nbits=2", tasks=["TASK"])
"""

from __future__ import annotations

from kvquant.errors import MissingExtraError

try:
    import lm_eval.models.huggingface  # noqa: F401
except ModuleNotFoundError as missing:
    raise MissingExtraError("lm-evaluation-harness", "pip install 'kvquant[lm-eval]'") from missing

from kvquant.integrations.lm_eval.model import KVQuantLM

__all__ = ["KVQuantLM"]
