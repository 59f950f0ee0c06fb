"""LoRA adapters: read, edit and write them, and the updates that their factors stand for."""
