"""Masks on a model in training: kept by any loop, by a Trainer, by TRL, and as torch's own pruning has them."""

import copy

import pytest
import torch
from torch.nn.utils import prune
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from optimum_barber import KeepMasks, PrunedModel, apply_masks, as_torch_pruning
from optimum_barber.base.errors import BarberError
from optimum_barber.integrations.training.masks import keep_of_parameters
from optimum_barber.integrations.training.trainer import examples

from .conftest import tiny_model
from .test_recover import OTHERS, WINDOWS, pruned, saved


@pytest.fixture(scope="module")
def sparse(model_dir, tmp_path_factory):
    return pruned(tmp_path_factory.mktemp("masks") / "sparse", model_dir)


class Plain(Trainer):
    """A trainer that knows nothing of masks."""


def train_plainly(model, folder, callbacks=()):
    arguments = TrainingArguments(
        output_dir=str(folder), max_steps=200, learning_rate=2e-3, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, weight_decay=0.1, label_names=["labels"],
        logging_steps=20,
    )  # fmt: skip
    trainer = Plain(model, arguments, train_dataset=examples(WINDOWS.tokens), callbacks=list(callbacks))
    trainer.train()
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def zeros_lost(model, masks):
    lost = 0
    for parameter, keep in keep_of_parameters(model, masks):
        lost += int(parameter.detach()[~keep].count_nonzero())
    return lost


def test_gradients_of_pruned_weights_are_zero_before_the_optimizer_sees_them(sparse):
    opened = PrunedModel.load(sparse)
    callback = KeepMasks(opened.model, opened.masks)
    callback.on_train_begin()
    opened.model(WINDOWS.tokens, labels=WINDOWS.tokens).loss.backward()
    keeps = keep_of_parameters(opened.model, opened.masks)
    assert all(parameter.grad[keep].any() for parameter, keep in keeps)
    assert not any(parameter.grad[~keep].any() for parameter, keep in keeps)
    callback.on_train_end()
    opened.model.zero_grad()
    opened.model(WINDOWS.tokens, labels=WINDOWS.tokens).loss.backward()
    assert any(parameter.grad[~keep].any() for parameter, keep in keeps)


@pytest.mark.filterwarnings("ignore:.*warmup.*")
def test_transformers_trainer_keeps_every_zero_under_the_callback_and_loses_them_without(sparse, tmp_path):
    opened = PrunedModel.load(sparse)
    losses = train_plainly(opened.model, tmp_path, [KeepMasks(opened.model, opened.masks)])
    assert losses[-1] < losses[0] / 2 and zeros_lost(opened.model, opened.masks) == 0
    plain = PrunedModel.load(sparse)
    train_plainly(plain.model, tmp_path)
    assert zeros_lost(plain.model, plain.masks) > 1000


@pytest.mark.parametrize("family", OTHERS)
def test_masks_find_their_places_in_transposed_and_common_parameters(family, tmp_path, tokenizer):
    model = OTHERS[family]()
    opened = PrunedModel.load(pruned(tmp_path / "sparse", saved(tmp_path / "dense", model, tokenizer)))
    dense = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "dense").named_parameters())
    names = {id(parameter): name for name, parameter in opened.model.named_parameters()}
    keeps = keep_of_parameters(opened.model, opened.masks)
    assert sum(int((~keep).sum()) for _, keep in keeps) == sum(mask.pruned for mask in opened.masks.values()) > 0
    for parameter, keep in keeps:
        assert torch.equal(parameter, dense[names[id(parameter)]] * keep)


def test_masks_of_another_model_are_refused(sparse):
    opened = PrunedModel.load(sparse)
    with pytest.raises(BarberError, match="model has no Linear model.layers.1"):
        KeepMasks(tiny_model(num_hidden_layers=1), opened.masks)
    with pytest.raises(BarberError, match="has shape .* its mask"):
        KeepMasks(tiny_model(intermediate_size=64), opened.masks)


class Mixing(torch.optim.SGD):
    """An optimizer whose step of one weight depends on the gradients of others, as Muon's does."""

    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None and parameter.ndim == 2:
                    parameter.grad += parameter.grad.mean()
        return super().step(closure)


OPTIMIZERS = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, nesterov=True, weight_decay=0.1),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, weight_decay=0.1),
    "adafactor": lambda parameters: torch.optim.Adafactor(parameters, lr=0.01),
}


def train(model, optimizer, steps=5):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(WINDOWS.tokens, labels=WINDOWS.tokens).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_plain_loop_keeps_every_zero_under_masks_and_loses_them_without(sparse, name):
    opened = PrunedModel.load(sparse)
    plain = copy.deepcopy(opened.model)
    apply_masks(opened.model, opened.masks)
    losses = train(opened.model, OPTIMIZERS[name](opened.model.parameters()))
    assert losses[-1] < losses[0] and zeros_lost(opened.model, opened.masks) == 0
    train(plain, OPTIMIZERS[name](plain.parameters()))
    assert zeros_lost(plain, opened.masks) > 1000


def test_an_optimizer_that_mixes_gradients_is_followed(sparse):
    opened = PrunedModel.load(sparse)
    applied, optimizer = apply_masks(opened.model, opened.masks), Mixing(opened.model.parameters(), lr=0.01)
    train(opened.model, optimizer, steps=1)
    assert zeros_lost(opened.model, opened.masks) > 1000
    applied.zero()
    assert zeros_lost(opened.model, opened.masks) == 0
    applied.follow(optimizer)
    train(opened.model, optimizer)
    assert zeros_lost(opened.model, opened.masks) == 0
    applied.remove()
    train(opened.model, optimizer, steps=1)
    assert zeros_lost(opened.model, opened.masks) > 1000


@pytest.mark.parametrize("family", [None, *OTHERS])
def test_masks_are_boolean_buffers_that_are_not_saved(family, sparse, tmp_path, tokenizer):
    if family is not None:
        sparse = pruned(tmp_path / "sparse", saved(tmp_path / "dense", OTHERS[family](), tokenizer))
    opened = PrunedModel.load(sparse)
    keys = set(opened.model.state_dict())
    applied = apply_masks(opened.model, opened.masks)
    buffers = {name: buffer for name, buffer in opened.model.named_buffers() if name.endswith("_mask")}
    assert len(buffers) == len(applied.places) == len(keep_of_parameters(opened.model, opened.masks))
    assert all(buffer.dtype == torch.bool for buffer in buffers.values())
    assert sum(int((~buffer).sum()) for buffer in buffers.values()) == sum(m.pruned for m in opened.masks.values())
    parameters = dict(opened.model.named_parameters())
    for name, buffer in buffers.items():
        assert not parameters[name.removesuffix("_mask")].detach()[~buffer].any()
    assert set(opened.model.state_dict()) == keys
    applied.remove()
    assert not [name for name, _ in opened.model.named_buffers() if name.endswith("_mask")]


def test_a_copy_of_a_masked_model_takes_the_same_masks_and_no_others(sparse, tmp_path, model_dir):
    opened = PrunedModel.load(sparse)
    apply_masks(opened.model, opened.masks)
    twin = copy.deepcopy(opened.model)
    apply_masks(twin, opened.masks)
    train(twin, OPTIMIZERS["adamw"](twin.parameters()))
    assert zeros_lost(twin, opened.masks) == 0
    others = PrunedModel.load(pruned(tmp_path / "other", model_dir, "1:4")).masks
    with pytest.raises(BarberError, match="has another weight_mask already: remove the masks that it has"):
        apply_masks(opened.model, others)


def test_a_parameter_that_is_trained_later_keeps_its_zeros(sparse):
    opened = PrunedModel.load(sparse)
    opened.model.requires_grad_(False)
    apply_masks(opened.model, opened.masks)
    assert not any(parameter.requires_grad for parameter in opened.model.parameters())
    opened.model.requires_grad_(True)
    train(opened.model, OPTIMIZERS["adamw"](opened.model.parameters()))
    assert zeros_lost(opened.model, opened.masks) == 0


def test_a_training_that_was_interrupted_begins_again(sparse):
    opened = PrunedModel.load(sparse)
    callback = KeepMasks(opened.model, opened.masks)
    for _ in range(2):
        callback.on_train_begin()
    train(opened.model, OPTIMIZERS["adamw"](opened.model.parameters()))
    assert zeros_lost(opened.model, opened.masks) == 0
    callback.on_train_end()
    assert not [name for name, _ in opened.model.named_buffers() if name.endswith("_mask")]


def test_masks_are_not_sent_among_ranks_at_every_pass(sparse):
    opened = PrunedModel.load(sparse)
    apply_masks(opened.model, opened.masks)
    buffers = {name for name, _ in opened.model.named_buffers() if name.endswith("_mask")}
    assert buffers and buffers <= set(opened.model._ddp_params_and_buffers_to_ignore)


def test_a_compiled_model_is_masked_within(sparse):
    opened = PrunedModel.load(sparse)
    applied = apply_masks(torch.compile(opened.model), opened.masks)
    assert len(applied.places) == len(opened.masks)


def test_masks_put_on_a_dense_model_prune_it_and_move_with_it(sparse, model_dir):
    opened, dense = PrunedModel.load(sparse), AutoModelForCausalLM.from_pretrained(model_dir)
    apply_masks(dense, opened.masks)
    for name in opened.masks:
        assert torch.equal(dense.get_submodule(name).weight, opened.model.get_submodule(name).weight)
    dense.to("meta")
    assert dense.model.layers[0].mlp.up_proj.weight_mask.device.type == "meta"


@torch.no_grad()
def test_torchs_own_pruning_has_the_masks(sparse):
    opened = PrunedModel.load(sparse)
    before = opened.model(WINDOWS.tokens).logits
    as_torch_pruning(opened.model, opened.masks)
    linear = opened.model.model.layers[0].mlp.up_proj
    keep = opened.keep("model.layers.0.mlp.up_proj")
    assert prune.is_pruned(opened.model) and torch.equal(linear.weight_mask.bool(), keep)
    assert torch.equal(opened.model(WINDOWS.tokens).logits, before)
    linear.weight_orig += 1
    after = opened.model(WINDOWS.tokens).logits
    assert not torch.equal(after, before)
    for put in (apply_masks, as_torch_pruning):
        with pytest.raises(BarberError, match="model has masks of torch.nn.utils.prune: remove those first"):
            put(opened.model, opened.masks)
    prune.remove(linear, "weight")
    assert torch.equal(opened.model(WINDOWS.tokens).logits, after)
    assert not linear.weight[~keep].any()


def test_torchs_own_pruning_is_refused_on_buffers(sparse):
    opened = PrunedModel.load(sparse)
    apply_masks(opened.model, opened.masks)
    with pytest.raises(BarberError, match="has a weight_mask already"):
        as_torch_pruning(opened.model, opened.masks)


@pytest.mark.filterwarnings("ignore")  # TRL's own
def test_trls_trainer_keeps_every_zero_under_the_callback(sparse, tmp_path):
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    opened = PrunedModel.load(sparse)
    rows = [{"input_ids": window.tolist()} for window in WINDOWS.tokens]
    arguments = SFTConfig(
        output_dir=str(tmp_path), max_steps=40, learning_rate=2e-3, per_device_train_batch_size=4, use_cpu=True,
        report_to="none", save_strategy="no", disable_tqdm=True, weight_decay=0.1, logging_steps=10, bf16=False,
    )  # fmt: skip
    trainer = SFTTrainer(
        opened.model, arguments, train_dataset=Dataset.from_list(rows), processing_class=opened.tokenizer,
        callbacks=[KeepMasks(opened.model, opened.masks)],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] and zeros_lost(opened.model, opened.masks) == 0
