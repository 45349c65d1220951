"""`diffxfer tune`."""

from __future__ import annotations

from diffxfer.cli import options as opt
from diffxfer.cli import tune_options as own
from diffxfer.cli.hub import tell_of_hub
from diffxfer.cli.tune_console import TuneConsole
from diffxfer.recycling.training_options import DISTILL_WEIGHT, TEMPERATURE, WARMUP


def tune(
    model: own.Model,
    data: own.Data,
    output: opt.Out,
    steps: own.Steps,
    objective: own.Objective = None,
    learning_rate: own.LearningRate = 2e-5,
    warmup: own.Warmup = WARMUP,
    batch_size: own.BatchSize = 8,
    gradient_accumulation: own.GradientAccumulation = 1,
    gradient_checkpointing: own.GradientCheckpointing = False,
    max_length: own.MaxLength = 1024,
    end_token: own.EndToken = True,
    seed: own.Seed = 0,
    teacher: own.Teacher = None,
    distill_weight: own.DistillWeight = DISTILL_WEIGHT,
    temperature: own.Temperature = TEMPERATURE,
    hidden_weight: own.HiddenWeight = 0.0,
    save_every: own.SaveEvery = None,
    restart: opt.Restart = False,
    overwrite: opt.Overwrite = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Train all parameters of a model further on rows of text."""
    from diffxfer import tune as tune_model

    with TuneConsole(output, json=json, quiet=quiet) as console:
        tell_of_hub(console.say, model, teacher)
        report = tune_model(
            model,
            data,
            output,
            objective=objective,
            steps=steps,
            learning_rate=learning_rate,
            warmup=warmup,
            batch_size=batch_size,
            gradient_accumulation=gradient_accumulation,
            gradient_checkpointing=gradient_checkpointing,
            max_length=max_length,
            end_token=end_token,
            seed=seed,
            teacher=teacher,
            distill_weight=distill_weight,
            temperature=temperature,
            hidden_weight=hidden_weight,
            save_every=save_every,
            restart=restart,
            overwrite=overwrite,
            progress=console.training,
            moved=console.progress,
            opened=console.opened,
        )
        console.show_tuned(report)
