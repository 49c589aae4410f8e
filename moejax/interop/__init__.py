"""Weights from and for the Hugging Face format: safetensors files beside a config.json."""
