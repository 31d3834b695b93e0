"""The name of every file in a checkpoint directory."""

FILE_NAME = "model.safetensors"
INDEX_NAME = "model.safetensors.index.json"
MASKS_NAME = "sparsity_masks.safetensors"
SPARSITY_NAME = "sparsity_config.json"
REPORT_NAME = "report.json"
STRUCTURE_NAME = "pruned_structure.json"
CONFIG_NAME = "barber_config.json"
