"""LoRAs and embeddings: the registry, and how weights and rights come into it.

`Lora` and `Registry` are what a request needs; core.loras.installing is for admins alone.
"""

from core.loras.registry import Lora, Registry

__all__ = ["Lora", "Registry"]
