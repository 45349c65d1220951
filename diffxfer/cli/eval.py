"""`diffxfer eval`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from diffxfer.cli import options as opt
from diffxfer.cli.cluster import GpusPerModel, Ray, cluster_of
from diffxfer.cli.eval_console import EvalConsole
from diffxfer.cli.help import EITHER, HOW, OUTPUT, PATH, PROMPTS, SAFETY, TASKS, WHAT, WHERE


def eval_models(
    models: Annotated[
        list[Path],
        typer.Argument(
            metavar="MODEL",
            help="Models: folders, or org/name[@revision]. The first is the target.",
        ),
    ],
    tasks: Annotated[
        str,
        typer.Option(
            rich_help_panel=TASKS,
            metavar="TASKS",
            help="lm-eval's tasks, groups, tags, patterns or YAML files, comma-separated:"
            " gsm8k,ifeval.",
        ),
    ],
    baseline: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=EITHER,
            help="The model that others are compared with; by default the first.",
        ),
    ] = None,
    finetuned: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=EITHER,
            help="The directly fine-tuned target, to show how much of its gain a graft recovers.",
        ),
    ] = None,
    diff: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=WHAT,
            metavar=EITHER,
            help="A diff vector or a LoRA adapter: also score its grafts on the first model.",
        ),
    ] = None,
    alpha: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=HOW,
            metavar="FLOATS",
            help="Scales of --diff, comma-separated: 0.8,1.0,1.2; by default 1.",
        ),
    ] = None,
    include_path: Annotated[
        Path | None,
        typer.Option(
            rich_help_panel=TASKS, metavar=PATH, help="A folder of lm-eval tasks of your own."
        ),
    ] = None,
    num_fewshot: Annotated[
        int | None,
        typer.Option(
            rich_help_panel=TASKS,
            metavar="N",
            help="Examples before each question; by default the task's.",
        ),
    ] = None,
    limit: Annotated[
        float | None,
        typer.Option(
            rich_help_panel=TASKS,
            metavar="N",
            help="Questions per task, or below 1 a share of them; for trials.",
        ),
    ] = None,
    batch_size: Annotated[
        str, typer.Option(rich_help_panel=WHERE, metavar="N|auto", help="Questions per batch.")
    ] = "1",
    device: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=WHERE,
            metavar="DEVICE",
            help="cpu, cuda, cuda:0, …; by default a GPU if there is one.",
        ),
    ] = None,
    dtype: Annotated[
        str,
        typer.Option(
            rich_help_panel=WHERE,
            metavar="DTYPE",
            help="Dtype of the loaded model; auto uses the stored one.",
        ),
    ] = "auto",
    apply_chat_template: Annotated[
        bool,
        typer.Option(
            "--apply-chat-template",
            rich_help_panel=PROMPTS,
            help="Format questions with the model's chat template.",
        ),
    ] = False,
    fewshot_as_multiturn: Annotated[
        bool | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            help="Give examples as turns of a conversation; the default with a chat template.",
        ),
    ] = None,
    system_instruction: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            metavar="TEXT",
            help="System message at the start of the conversation.",
        ),
    ] = None,
    gen_kwargs: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=PROMPTS,
            metavar="K=V,…",
            help="Generation settings: do_sample=True,top_p=0.9.",
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            rich_help_panel=WHERE,
            metavar="NAME",
            help="lm-eval's backend: hf, vllm, or another; classifier for classification heads.",
        ),
    ] = "hf",
    model_args: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=WHERE,
            metavar="K=V,…",
            help="Arguments of the backend: max_length=4096.",
        ),
    ] = None,
    seed: Annotated[
        str | None,
        typer.Option(
            rich_help_panel=TASKS,
            metavar="N",
            help="One seed, or four for Python, numpy, torch and few-shot; 0,1234,1234,1234.",
        ),
    ] = None,
    trust_remote_code: Annotated[
        bool,
        typer.Option(
            "--trust-remote-code",
            rich_help_panel=SAFETY,
            help="Run code that comes with a model.",
        ),
    ] = False,
    ray: Ray = None,
    gpus_per_model: GpusPerModel = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "-o",
            "--output",
            rich_help_panel=OUTPUT,
            metavar=PATH,
            help="Folder for lm-eval's files, comparison.json and report.html; scores in it are"
            " used again.",
        ),
    ] = None,
    json: opt.Json = False,
    quiet: opt.QuietTalk = False,
) -> None:
    """Score models and grafts with lm-eval, on the same questions."""
    from diffxfer import evaluate

    alphas = opt.parse_alphas(alpha)
    console = EvalConsole(json=json, quiet=quiet)
    with console, cluster_of(ray, console) as cluster:
        evaluation = evaluate(
            models,
            tasks=tasks,
            baseline=baseline,
            finetuned=finetuned,
            diff=diff,
            alpha=alphas,
            include_path=include_path,
            num_fewshot=num_fewshot,
            limit=limit,
            batch_size=batch_size,
            device=device,
            dtype=dtype,
            apply_chat_template=apply_chat_template,
            fewshot_as_multiturn=fewshot_as_multiturn,
            system_instruction=system_instruction,
            gen_kwargs=gen_kwargs,
            backend=backend,
            model_args=model_args,
            seed=seed,
            trust_remote_code=trust_remote_code,
            output=output,
            progress=console.say,
            moved=console.progress,
            answered=console.answered,
            opened=console.opened,
            salvage=console.keep,
            cluster=cluster,
            gpus_per_model=gpus_per_model,
        )
        console.keep(evaluation)
