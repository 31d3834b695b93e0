"""Where the modules of 0.1.0 went: an import of an old name is answered by one line that gives the new one."""

from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import ModuleType

PACKAGE = __name__.partition(".")[0]

# New package -> modules that keep their name in it. Both are relative to the root package.
SAME_NAME = {
    "base": "errors memory output ranks registry",
    "tensors": "budget derivatives dsnot gptq least_squares masks patterns quantize scores sums swaps",
    "models": "activations architectures blocks loading source",
    "checkpoints": "foreign pruned runtimes shards verify",
    "text": "own_text",
    "prune": "allocations inspection pipeline producers quadratic rebuilders reconstructions refine sparsifier",
    "runs": "compare recipe report sweep",
}
# Old name -> new name. Modules that nobody but the package itself imported give the package that they are in now.
NEW_NAME = {
    "validators": "base.fields", "selection": "tensors.order", "statistics": "tensors.input_statistics",
    "rebuild": "tensors.exchange", "semi_structured": "tensors.exchange", "swap_steps": "tensors",
    "judges": "tensors.objectives", "distribution": "tensors.exchange", "precision": "models.device",
    "latency": "models.measure", "transfer": "models.activations", "stored": "checkpoints",
    "gguf_weights": "checkpoints.gguf", "artifacts": "checkpoints.record", "checkpoint": "checkpoints.write",
    "weights": "checkpoints.safetensors", "bits": "tensors.masks", "texts": "text.sources",
    "calibration": "text.windows", "training_windows": "text.training", "evaluate": "text.perplexity",
    "window_offsets": "text.windows", "rank_group": "base.ranks",
    "config": "prune.settings", "rebuild_config": "prune.rebuild_settings", "planning": "prune.plan",
    "answers": "prune", "trial": "prune", "closing": "prune", "block_quadratic": "prune",
    "streaming": "prune.streaming", "disk": "prune.streaming", "progress": "prune.streaming",
    "preflight": "prune.cost", "work": "prune.cost", "timing": "prune.cost", "rates": "prune.cost",
    "structured": "shrink",
    "integrations.lm_eval_cache": "integrations.lm_eval.checkpoint",
    "integrations.lm_eval_offline": "runs.tasks.offline",
    "integrations.lm_eval_run": "runs.tasks.evaluate",
    "integrations.lm_eval_settings": "integrations.lm_eval.checkpoint",
    "integrations.lm_eval_shrink": "integrations.lm_eval.arguments",
    "integrations.masked_lora": "integrations.lora.masked_lora",
    "integrations.lora_adapter": "integrations.lora.checkpoint",
    "integrations.lora_binding": "integrations.lora.masked_lora",
    "integrations.lora_trainer": "integrations.lora.training",
    "integrations.quantize_settings": "integrations.quantization.settings",
    "integrations.compressed_checkpoint": "integrations.quantization.quantize",
}  # fmt: skip
# Package of `integrations` -> its modules, whose names began with the package's.
PREFIXED = {
    "lora": "checkpoint layer settings training",
    "lm_eval": "model",
}


MOVED = dict(NEW_NAME)
for package, names in SAME_NAME.items():
    MOVED.update({name: f"{package}.{name}" for name in names.split()})
for package, names in PREFIXED.items():
    MOVED.update({f"integrations.{package}_{name}": f"integrations.{package}.{name}" for name in names.split()})


class MovedModules(MetaPathFinder):
    """A finder for `sys.meta_path`, behind all others: it never finds a module, but says where one is now."""

    def find_spec(self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None) -> None:
        """Answer a name of 0.1.0.

        Raises:
            ModuleNotFoundError: gives the new name.
        """
        package, _, name = fullname.partition(".")
        if package == PACKAGE and name in MOVED:
            raise ModuleNotFoundError(f"{fullname} is {package}.{MOVED[name]} since 0.2.0", name=fullname)
