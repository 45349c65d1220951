"""`diffxfer transfer`."""

from __future__ import annotations

from diffxfer.cli import options as opt
from diffxfer.cli.cluster import Ray, cluster_of
from diffxfer.cli.console import Console
from diffxfer.cli.hub import tell_of_hub


def transfer(
    finetuned: opt.Finetuned,
    base: opt.Base,
    target: opt.Target,
    output: opt.Out,
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
    """Extract and apply at once: target + alpha · (finetuned − base)."""
    from diffxfer import transfer as transfer_models

    scales = opt.parse_alpha_for(alpha_for)
    console = Console(json=json, quiet=quiet, output=output)
    with console, cluster_of(ray, console) as cluster:
        tell_of_hub(console.say, finetuned, base, target)
        report = transfer_models(
            finetuned,
            base,
            target,
            output,
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
