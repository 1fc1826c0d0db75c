"""Show the results of the quickstart: accuracy and answers before and after training, and the training curves.

    python examples/quickstart/show.py TASK_DIRECTORY RUN_DIRECTORY

The checkpoints are loaded with transformers, independently of the engine. The exit code is 1 if transformers and the
engine disagree on the log-probabilities of the held-out pairs.
"""

import argparse
import json
import sys
from pathlib import Path

import pyarrow.parquet
import sentencepiece
import torch
from make_task import IGNORED, collate
from matplotlib.figure import Figure
from task import Question
from transformers import LlamaForCausalLM
from transformers.utils import logging

# For each answer, transformers and the engine add at most a dozen fp32 log-probabilities, in different orders. The two
# sums differ by about 1e-5.
TOLERANCE = 1e-4


class Judge:
    """Evaluation of a checkpoint: the log-probabilities of the held-out answers, and the model's own greedy answers."""

    def __init__(self, checkpoint: Path, held_out: list[Question]):
        self.tokenizer = sentencepiece.SentencePieceProcessor(model_file=str(checkpoint / "tokenizer.model"))
        self.model = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
        self.held_out = held_out
        self.chosen, self.rejected = self._logps()
        self.answers = self._answers()

    def _logps(self) -> tuple[list[float], list[float]]:
        """Return the log-probabilities of the right and the wrong answers, summed over each answer's tokens."""
        rows = collate(self.held_out, self.tokenizer)
        targets = rows["labels"][:, 1:]
        with torch.no_grad():
            logits = self.model(input_ids=rows["input_ids"]).logits[:, :-1]
        logps = logits.log_softmax(-1).gather(-1, targets.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        sums = (logps * (targets != IGNORED)).sum(-1)
        return sums[0::2].tolist(), sums[1::2].tolist()

    def _answers(self) -> list[str]:
        """Generate the greedy answer to each held-out question."""
        prompts = [self.tokenizer.encode(question.prompt) for question in self.held_out]
        answers = [""] * len(prompts)
        for length in {len(prompt) for prompt in prompts}:  # rows of equal length need no padding
            places = [place for place, prompt in enumerate(prompts) if len(prompt) == length]
            input_ids = torch.tensor([prompts[place] for place in places])
            rows = self.model.generate(
                input_ids=input_ids,
                attention_mask=torch.ones_like(input_ids),
                max_new_tokens=12,
                do_sample=False,
                pad_token_id=self.tokenizer.eos_id(),
            )
            for place, row in zip(places, rows[:, length:].tolist(), strict=True):
                ended = row.index(self.tokenizer.eos_id()) if self.tokenizer.eos_id() in row else len(row)
                answers[place] = self.tokenizer.decode(row[:ended])
        return answers

    @property
    def ranked_correctly(self) -> float:
        """Fraction of held-out pairs whose right answer is more likely than the wrong one."""
        return sum(good > bad for good, bad in zip(self.chosen, self.rejected, strict=True)) / len(self.held_out)

    @property
    def answered_correctly(self) -> float:
        """Fraction of held-out questions that the model answers correctly."""
        return sum(a == question.right for a, question in zip(self.answers, self.held_out, strict=True)) / len(
            self.held_out
        )


def difference(judge: Judge, evaluation: Path) -> float:
    """Return the largest difference, in nats, between the log-probabilities of transformers and those of the engine."""
    rows = pyarrow.parquet.read_table(evaluation).to_pylist()
    if sorted(row["index"] for row in rows) != list(range(len(judge.held_out))):
        raise SystemExit(f"{evaluation}: must contain each of the {len(judge.held_out)} held-out pairs once")
    return max(
        abs(ours - theirs)
        for row in rows
        for ours, theirs in (
            (row["chosen_logps"], judge.chosen[row["index"]]),
            (row["rejected_logps"], judge.rejected[row["index"]]),
        )
    )


def draw(metrics: list[dict[str, float]], path: Path) -> None:
    """Save a PNG with curves of loss, accuracy and margin, in training and on the held-out pairs."""
    names = (("loss", "loss (nats)"), ("rewards/accuracies", "reward accuracy"), ("rewards/margins", "reward margin"))
    figure = Figure(figsize=(12, 3.4), layout="constrained")
    axes = figure.subplots(1, len(names))
    for axis, (name, title) in zip(axes, names, strict=True):
        for key, style, label in ((name, "-", "training"), (f"eval/{name}", "o-", "held out")):
            points = [(row["step"], row[key]) for row in metrics if key in row]
            axis.plot(*zip(*points, strict=True), style, label=label)
        axis.set(title=title, xlabel="optimizer step")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path, dpi=110)


def result(task: Path, run: Path) -> int:
    """Print all results, save the curves, and return the exit code."""
    logging.disable_progress_bar()
    lines = (task / "held_out.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [{name: text.strip() for name, text in json.loads(line).items()} for line in lines]
    held_out = [Question(row["prompt"], row["chosen"], row["rejected"], frozenset()) for row in rows]
    metrics = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    before, after = Judge(task / "base", held_out), Judge(run / "hf", held_out)
    rewards = [row["eval/rewards/accuracies"] for row in metrics if "eval/rewards/accuracies" in row]

    print(f"\n{len(held_out)} held-out questions                        before     after")
    for name, first, last in (
        ("pairs ranked correctly (by likelihood)", before.ranked_correctly, after.ranked_correctly),
        ("questions answered correctly (greedy)", before.answered_correctly, after.answered_correctly),
        ("reward accuracy (a tie counts as half)", rewards[0], rewards[-1]),
    ):
        print(f"  {name:<42}{first:>8.1%}  {last:>8.1%}")

    corrected = [
        place
        for place, question in enumerate(held_out)
        if before.answers[place] == question.wrong and after.answers[place] == question.right
    ]
    print("\nheld-out samples (greedy)")
    for place in corrected[:2]:
        print(f"  {held_out[place].prompt:<22} before: {before.answers[place]:<10} after: {after.answers[place]}")

    draw(metrics, run / "curves.png")
    gap = difference(after, max((run / "eval").glob("step_????????.parquet")))
    verdict = "agree" if gap <= TOLERANCE else "DISAGREE"
    print(f"\nexported checkpoint   {run / 'hf'}")
    print(f"  transformers and the engine {verdict}: log-probabilities of {2 * len(held_out)} answers differ by")
    print(f"  at most {gap:.1e} nats (tolerance {TOLERANCE:.0e})")
    print(f"curves                {run / 'curves.png'}")
    print(f"page                  {run / 'report.html'}")
    return 0 if gap <= TOLERANCE else 1


def main() -> int:
    """Parse the command line, and show the results."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("task", type=Path, help="directory written by make_task.py")
    parser.add_argument("run", type=Path, help="train.output_dir of a finished run")
    asked = parser.parse_args()
    return result(asked.task, asked.run)


if __name__ == "__main__":
    sys.exit(main())
