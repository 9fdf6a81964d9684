"""Policy gradients as in GRPO with a patched model, where all completions of a prompt share it in one row.

The data are functions of Python's standard library: the model continues them, and is rewarded for each word of the
prompt that it uses again. Every step samples a group of completions for each prompt, and weights their
log-probabilities with the rewards less their mean in the group (DeepSeekMath, arXiv 2402.03300). The completions of the
first step are computed with repeated prompts too: loss and gradients must agree.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # for `python examples/shared_prompts.py`

import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from rich.progress import track
from transformers import AutoModelForCausalLM

from examples import common
from examples.packing import definitions
from examples.report import COLORS, console
from llama_kernels.integrations.transformers import share_prompts
from llama_kernels.integrations.transformers.packed_masks import unpack

# Options of the other examples. Here the data are built in, the model is patched, and it is not saved.
REFUSED = ("data", "stock", "compare", "save")
BLOCK = 64  # rows and keys of a block, for the count of the attention's work


class Group(NamedTuple):
    """Completions of one prompt, and the advantage of each."""

    prompt: list[int]
    completions: list[list[int]]
    advantages: torch.Tensor


class Step(NamedTuple):
    loss: torch.Tensor
    tokens: int  # that the model computed, without padding
    blocks: int  # of BLOCK rows and BLOCK keys that attention visits


def sample(model: Any, prompt: list[int], args: argparse.Namespace) -> tuple[Group, float]:
    """A group of completions with their advantages, and their mean reward."""
    ids = torch.tensor([prompt], device=args.device)
    tokens = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=True, num_return_sequences=args.completions,
        max_new_tokens=args.tokens, min_new_tokens=args.tokens, use_cache=True,
    )  # fmt: skip
    completions = tokens[:, len(prompt) :].tolist()
    words = set(prompt)
    rewards = torch.tensor([sum(token in words for token in completion) / args.tokens for completion in completions])
    advantages = (rewards - rewards.mean()) / (rewards.std() + 1e-4)
    return Group(prompt, completions, advantages.to(args.device)), rewards.mean().item()


def log_probs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """(B, S - 1): of each token but the first, by the logits of the token before."""
    return -F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none").view(
        ids.shape[0], -1
    )


def shared_step(model: Any, groups: list[Group]) -> Step:
    """One row for each prompt."""
    device = groups[0].advantages.device
    batch = share_prompts([group.prompt for group in groups], [group.completions for group in groups], device=device)
    inputs = {name: x for name, x in batch.inputs.items() if name != "labels"}
    which = batch.completion[:, 1:]
    advantages = torch.stack([group.advantages for group in groups]).gather(1, which.clamp(min=0))
    terms = advantages * log_probs(model(**inputs).logits, inputs["input_ids"])
    S = which.shape[1] + 1
    ranges = unpack(inputs["attention_mask"], S, S)
    blocks = sum(visited(*row) for row in zip(ranges.start.cpu(), ranges.end.cpu(), ranges.prefix.cpu(), strict=True))
    tokens = sum(len(group.prompt) - 1 + sum(len(c) + 1 for c in group.completions) for group in groups)
    return Step(-terms[which >= 0].mean(), tokens, blocks)


def repeated_step(model: Any, groups: list[Group]) -> Step:
    """One row for each completion, after a copy of its prompt."""
    terms, tokens, blocks = [], 0, 0
    for group in groups:
        rows = [[*group.prompt, *completion] for completion in group.completions]
        ids = torch.tensor(rows, device=group.advantages.device)
        terms.append(group.advantages[:, None] * log_probs(model(ids).logits, ids)[:, len(group.prompt) - 1 :])
        i = torch.arange(ids.shape[1])
        tokens, blocks = tokens + ids.numel(), blocks + len(rows) * visited(0 * i, i + 1, 0 * i)
    return Step(-torch.cat([x.flatten() for x in terms]).mean(), tokens, blocks)


def visited(start: torch.Tensor, end: torch.Tensor, prefix: torch.Tensor) -> int:
    """Blocks of keys that the forward visits for the rows of one sequence, BLOCK rows at a time."""
    count = 0
    for rows in torch.arange(len(start)).split(BLOCK):
        of_prefix = -(-int(prefix[rows].max()) // BLOCK)
        own = max(int(start[rows].min()) // BLOCK, of_prefix)
        count += of_prefix + max(-(-int(end[rows].max()) // BLOCK) - own, 0)
    return count


def compare(model: Any, groups: list[Group]) -> dict[str, float]:
    """Loss and gradients of the shared and of the repeated step, and the work of each.

    With random advantages: those of a group of equal rewards are 0, and so would the gradients be.
    """
    groups = [group._replace(advantages=torch.randn_like(group.advantages)) for group in groups]
    steps, gradients = [], []
    for step in (shared_step, repeated_step):
        model.zero_grad()
        steps.append(step(model, groups))
        steps[-1].loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    shared, repeated = steps
    apart = ((gradients[0] - gradients[1]).norm() / gradients[1].norm()).item()
    console.print(f"loss {shared.loss.item():.6f} with shared prompts, {repeated.loss.item():.6f} with repeated ones")
    console.print(f"gradients: {apart:.1e} of their norm apart")
    console.print(f"tokens: {shared.tokens} instead of {repeated.tokens}, {shared.tokens / repeated.tokens:.0%}")
    console.print(f"blocks of attention: {shared.blocks} instead of {repeated.blocks}, "
                  f"{shared.blocks / repeated.blocks:.0%}")  # fmt: skip
    names = ("tokens", "blocks")
    work = {f"{kind} {name}": getattr(step, name) for kind, step in zip(("shared", "repeated"), steps, strict=True)
            for name in names}  # fmt: skip
    return {"gradients apart": apart, **work}


def plot(rewards: list[float], numbers: dict[str, float], path: Path) -> None:
    figure = Figure(figsize=(10, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot(range(1, len(rewards) + 1), rewards, color=COLORS["patched"], lw=2)
    left.set(title=f"The reward rises from {rewards[0]:.2f} to {rewards[-1]:.2f}", xlabel="step",
             ylabel="share of tokens that the prompt has", ylim=(0, None))  # fmt: skip
    for i, kind in enumerate(("repeated", "shared")):
        heights = [numbers[f"{kind} {name}"] / numbers[f"repeated {name}"] for name in ("tokens", "blocks")]
        bars = right.bar([x + 0.4 * i for x in (0, 1)], heights, 0.36, color=list(COLORS.values())[i], label=kind)
        right.bar_label(bars, [f"{height:.0%}" for height in heights])
    right.set(title="Work of a step, of that with repeated prompts", ylabel="share", ylim=(0, 1.15))
    right.set_xticks([0.2, 1.2], ["tokens", "blocks of attention"])
    right.legend(frameon=False, loc="upper center")
    figure.savefig(path, dpi=120)


def main() -> int:
    data = "refused here, as are --stock, --compare and --save"
    parser = common.arguments(__doc__, data, steps=20, batch=2, max_length=192, lr=2e-3)
    parser.add_argument("--completions", type=common.positive, default=8, help="of a prompt (default: %(default)s)")
    parser.add_argument("--tokens", type=common.positive, default=16, help="of a completion (default: %(default)s)")
    args = common.parse(parser)
    if given := [f"--{name}" for name in REFUSED if getattr(args, name)]:
        parser.error(f"{', '.join(given)}: not in this example, which trains a patched model on built-in data")
    texts = definitions(args.seed)
    tokenizer = common.load_tokenizer(args.model, texts)
    model = common.load_model(AutoModelForCausalLM, args, tokenizer)
    common.prepare(model, "patched", args)
    prompts = [ids[: args.max_length] for ids in tokenizer(texts)["input_ids"]]
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    rewards, numbers = [], {}
    for step in track(range(args.steps), "training", console=console):
        torch.manual_seed(args.seed + step)
        chosen = torch.randint(len(prompts), (args.batch,)).tolist()
        groups, means = zip(*(sample(model, prompts[i], args) for i in chosen), strict=True)
        rewards.append(sum(means) / len(means))
        if step == 0:
            numbers = compare(model, list(groups))
        optimizer.zero_grad()
        shared_step(model, list(groups)).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    args.out.mkdir(parents=True, exist_ok=True)
    picture, file = (args.out / f"shared_prompts.{kind}" for kind in ("png", "json"))
    plot(rewards, numbers, picture)
    file.write_text(json.dumps({"rewards": rewards, **numbers}, indent=1) + "\n")
    console.print(f"reward: {rewards[0]:.3f} in the first step, {rewards[-1]:.3f} in the last\n{picture}, {file}")
    held = args.dtype != "float32" or numbers["gradients apart"] < 1e-4
    if not held:
        console.print("FAILS: the gradients are more than 1e-4 of their norm apart", style="red")
    return 0 if held else 1


if __name__ == "__main__":
    sys.exit(main())
