"""`diffxfer probe`."""

from __future__ import annotations

from diffxfer.cli import options as opt
from diffxfer.cli import probe_options as own
from diffxfer.cli.hub import tell_of_hub
from diffxfer.cli.options import parse_alphas


def probe(
    finetuned: own.Finetuned,
    base: opt.Base,
    target: opt.Target,
    direct: own.Direct = None,
    data: own.Data = None,
    tasks: own.Tasks = None,
    include_path: own.IncludePath = None,
    limit: own.Limit = None,
    alpha: own.Alphas = "1.0",
    points: own.Points = 11,
    forward: own.Forward = False,
    rows: own.Rows = 200,
    batch_size: own.BatchSize = 16,
    device: own.ModelDevice = None,
    seed: own.Seed = 0,
    output: own.Output = None,
    include: own.Include = None,
    exclude: opt.Exclude = None,
    allow_missing: own.AllowMissing = None,
    added: own.Added = "refuse",
    rename: own.Rename = None,
    vocab: opt.Vocab = "auto",
    threads: opt.Threads = None,
    stream: opt.StreamInputs = False,
    json: opt.Json = False,
    quiet: opt.QuietTalk = False,
) -> None:
    """Measure whether a graft will work, and why, before it is made."""
    from diffxfer import probe as probe_models
    from diffxfer.cli.probe_console import ProbeConsole

    loads = forward or data is not None or tasks is not None
    with ProbeConsole(json=json, quiet=quiet, loads=loads) as console:
        tell_of_hub(console.say, finetuned, base, target, direct)
        report = probe_models(
            finetuned,
            base,
            target,
            direct=direct,
            data=data,
            tasks=tasks,
            include_path=include_path,
            limit=limit,
            alpha=parse_alphas(alpha) or (),
            points=points,
            forward=forward,
            rows=rows,
            batch_size=batch_size,
            device=device,
            seed=seed,
            output=output,
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing or (),
            added=added,
            rename=rename or (),
            vocab=vocab,
            threads=threads,
            stream=stream,
            progress=console.progress,
            stage=console.begin,
        )
        console.show_probe(report)
