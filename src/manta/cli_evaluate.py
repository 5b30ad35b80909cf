"""`manta evaluate`."""

from __future__ import annotations

from typing import Any

import click

from manta.cli_options import BASE_MODEL, CHECKPOINTS_DIR, FULL_FT, RUN, console, run_of

# Which options belong to which part of `manta.evaluate`.
_SAMPLING = ("max_tokens", "temperature", "top_p", "top_k", "max_model_len")
_SCORING = ("answer_pattern", "normalize", "bertscore_model", "bertscore_layer")
_WHERE = (
    *("engine", "vllm", "device", "dtype", "workers", "ray_address", "tensor_parallel_size", "gpu_memory_utilization"),
)


@click.command()
@RUN
@BASE_MODEL
@CHECKPOINTS_DIR
@FULL_FT
@click.option(
    "--checkpoints", default="best", metavar="best,latest,STEP", help="Which to compare with the base  ['best']"
)
@click.option("--test_path", metavar="FILE", help="JSONL with input and output; default: the run's own test split")
@click.option("--max_samples", type=click.IntRange(1), default=1024, help="Most rows to score  [1024]")
@click.option("--batch_size", type=click.IntRange(1), default=128, help="Rows generated at once  [128]")
@click.option("--max_tokens", type=click.IntRange(1), default=512, help="Most tokens of one answer  [512]")
@click.option("--temperature", type=click.FloatRange(0), default=0.1, help="0: always the likeliest token  [0.1]")
@click.option("--top_p", type=click.FloatRange(0, 1), default=0.95, help="Sample from this much probability  [0.95]")
@click.option("--top_k", type=int, default=-1, help="Sample from the k likeliest; -1: all  [-1]")
@click.option("--max_model_len", type=click.IntRange(2), default=8192, help="Longest prompt and answer  [8192]")
@click.option(
    "--answer_pattern",
    default="auto",
    metavar="all|gsm8k|REGEX",
    help="What of an output is its answer: all of it, GSM8K's `#### n`, or a regular expression's first group; "
    "auto: gsm8k where all references have it  ['auto']",
)
@click.option(
    "--normalize",
    type=click.Choice(["auto", "strip", "words", "number"]),
    default="auto",
    help="What does not count: space around; case, punctuation and articles; a number's form  ['auto']",
)
@click.option(
    "--bertscore_model",
    default="auto",
    metavar="MODEL",
    help="Text encoder; auto: one that is here already; off: leave BERTScore out  ['auto']",
)
@click.option("--bertscore_layer", type=int, help="Whose output is compared; default: the usual one, or the last")
@click.option("--engine", type=click.Choice(["auto", "hf", "vllm"]), default="auto", help="auto: vllm on GPUs, else hf")
@click.option("--vllm", metavar="PYTHON", help="The Python that has vLLM; default: this one, or that of `make vllm`")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to compute")
@click.option("--dtype", type=click.Choice(["auto", "bfloat16", "float32"]), default="auto", help="Precision  [auto]")
@click.option("--workers", type=click.IntRange(1), help="Actors that answer; default: one per GPU, or 1")
@click.option("--ray_address", metavar="ADDRESS", help="Ray cluster to join; default: one of our own")
@click.option("--tensor_parallel_size", type=click.IntRange(1), default=1, help="vLLM: GPUs of one actor  [1]")
@click.option("--gpu_memory_utilization", type=click.FloatRange(0, 1), default=0.9, help="vLLM: share to use  [0.9]")
def evaluate(
    run: str | None, base_model: str | None, checkpoints_dir: str, full_ft: bool | None, **options: Any
) -> None:
    """Compare base and tuned on the held-out test split: loss, exact match, ROUGE, BLEU, chrF, BERTScore, and a page.

    The same command after a kill goes on with the answers that are there.
    """
    from manta.evaluate import Sampling, Scoring, Where, print_table
    from manta.evaluate import evaluate as evaluate_run

    def taken(names: tuple[str, ...]) -> dict[str, Any]:
        return {name: options.pop(name) for name in names}

    sampling, scoring, where = Sampling(**taken(_SAMPLING)), Scoring(**taken(_SCORING)), Where(**taken(_WHERE))
    found = run_of(run, base_model, checkpoints_dir, full_ft)
    options["checkpoints"] = [each.strip() for each in options["checkpoints"].split(",")]
    print_table(evaluate_run(found, sampling=sampling, scoring=scoring, where=where, **options), console())
    click.echo(f"page: {found.path / 'evaluation' / 'report.html'}")
