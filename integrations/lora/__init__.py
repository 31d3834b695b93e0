"""LoRA that keeps masks, by peft."""
