"""Adapters that plug the core into diffusers transformers. Only this package imports diffusers or peft."""
