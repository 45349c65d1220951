"""`diffxfer apply`."""

from __future__ import annotations

from diffxfer.cli import lora_options as lora
from diffxfer.cli import options as opt
from diffxfer.cli.cluster import Ray, cluster_of
from diffxfer.cli.console import Console
from diffxfer.cli.hub import tell_of_hub


def apply(
    diff: opt.Diff,
    target: opt.Target,
    output: opt.Out,
    as_: lora.ApplyAs = "model",
    alpha: opt.Alpha = 1.0,
    alpha_for: opt.AlphaFor = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    allow_missing: opt.AllowMissing = None,
    added: opt.Added = "refuse",
    rename: opt.Rename = None,
    vocab: opt.Vocab = "auto",
    out_dtype: opt.OutDtype = None,
    requantize: opt.Requantize = False,
    allow_nonfinite: opt.AllowNonfinite = False,
    allow_unrelated: opt.AllowUnrelated = False,
    max_shard_size: opt.MaxShardSize = None,
    threads: opt.Threads = None,
    device: opt.Device = "cpu",
    device_memory: opt.DeviceMemory = "512MB",
    ray: Ray = None,
    overwrite: opt.Overwrite = False,
    restart: opt.Restart = False,
    stream: opt.Stream = False,
    dry_run: opt.DryRun = False,
    json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Graft a diff vector on a newer base: target + alpha · diff."""
    from diffxfer import apply_diff

    scales = opt.parse_alpha_for(alpha_for)
    console = Console(json=json, quiet=quiet, output=output)
    with console, cluster_of(ray, console) as cluster:
        tell_of_hub(console.say, diff, target)
        report = apply_diff(
            diff,
            target,
            output,
            as_=as_,
            alpha=alpha,
            alpha_for=scales,
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing or (),
            added=added,
            rename=rename or (),
            vocab=vocab,
            out_dtype=out_dtype,
            requantize=requantize,
            allow_nonfinite=allow_nonfinite,
            allow_unrelated=allow_unrelated,
            max_shard_size=max_shard_size,
            threads=threads,
            device=device,
            device_memory=device_memory,
            overwrite=overwrite,
            restart=restart,
            stream=stream,
            dry_run=dry_run,
            progress=console.progress,
            cluster=cluster,
        )
        console.show(report)
