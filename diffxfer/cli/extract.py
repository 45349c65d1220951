"""`diffxfer extract`."""

from __future__ import annotations

from diffxfer.cli import lora_options as lora
from diffxfer.cli import options as opt
from diffxfer.cli.cluster import Ray, cluster_of
from diffxfer.cli.console import Console
from diffxfer.cli.hub import tell_of_hub


def extract(
    finetuned: opt.Finetuned,
    base: opt.Base,
    output: opt.Out,
    as_: lora.As = "diff",
    rank: lora.Rank = None,
    energy: lora.Energy = None,
    max_rank: lora.MaxRank = None,
    rest: lora.Rest = "modules_to_save",
    exact: lora.Exact = False,
    diff_dtype: opt.DiffDtype = "source",
    pack: opt.Pack = None,
    pack_level: opt.PackLevel = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    allow_missing: opt.AllowMissing = None,
    added: opt.Added = "refuse",
    rename: opt.Rename = None,
    vocab: opt.Vocab = "auto",
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
    """Write the diff vector of a fine-tuned model, or a LoRA adapter."""
    from diffxfer import extract_diff

    console = Console(json=json, quiet=quiet, output=output)
    with console, cluster_of(ray, console) as cluster:
        tell_of_hub(console.say, finetuned, base)
        report = extract_diff(
            finetuned,
            base,
            output,
            as_=as_,
            rank=rank,
            energy=energy,
            max_rank=max_rank,
            rest=rest,
            exact=exact,
            diff_dtype=diff_dtype,
            pack=False if pack is None else pack,
            pack_level=pack_level,
            include=include or (),
            exclude=exclude or (),
            allow_missing=allow_missing or (),
            added=added,
            rename=rename or (),
            vocab=vocab,
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
