"""Training of LoRAs for both stages; the adapters are peft's."""
