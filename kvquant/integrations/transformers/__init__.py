"""kvquant inside transformers: what `install()` adds to it, and `uninstall()` takes away again.

    import kvquant.integrations.transformers as integration

    integration.install()

The caches of ``generate(cache_implementation="quantized", cache_config={...})`` are then kvquant's, with every backend
that is installed (`caches`), and there is the attention ``attn_implementation="kvquant"`` (`attention`).
"""

from kvquant.integrations.transformers import attention, caches
from kvquant.integrations.transformers.attention import NAME, attention_forward

__all__ = ["NAME", "attention_forward", "install", "is_installed", "uninstall"]


def install() -> None:
    """Make kvquant's caches and its attention those of transformers. Doing so again changes nothing."""
    attention.register()
    caches.hook()


def is_installed() -> bool:
    """Whether `install` has been called, and `uninstall` not since."""
    return caches.is_hooked()


def uninstall() -> None:
    """Leave transformers as if `install` had never been called."""
    caches.unhook()
    attention.unregister()
