"""Ways to break a file: its structure if it is JSON or has a header, otherwise its bytes."""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import zstandard

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from random import Random


@dataclass(frozen=True)
class Link:
    """A symbolic link in the place of a file."""

    to: str


@dataclass(frozen=True)
class Raw:
    """JSON text that is inserted unchanged."""

    text: str


NUMBERS: tuple[Any, ...] = (
    *(0, 1, -1, 2, 3, 7, 8, 9, 24, 48, 255, 1 << 16, (1 << 22) - 1, 1 << 22, (1 << 31) - 1),
    *(1 << 31, 1 << 32, 1 << 40, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 1 << 64, 1 << 200),
    *(-(1 << 63), 1.0, 0.5, -0.0, 1e308, 5.0),
)
LITERALS = (
    *("NaN", "Infinity", "-Infinity", "1e999", "-0", "1E2", "1.0", "1" * 30, "9" * 399, "0e0"),
    *('"\\ud83d\\ude00"', '"\\u0000"', '"\\u001b[2J"', '{"a":1,"a":2}', "[" * 30 + "]" * 30),
    *("[" * 58 + "]" * 58, '{"a":' * 50 + "1" + "}" * 50, '{"vocab_size": 9}', "[[]]", "1e-400"),
)
WRONG = (
    *("0x10", "01", "+1", "True", "9" * 401, "9" * 5000, "-" + "8" * 4400, "1e" + "9" * 500),
    *(
        '"\\ud800"',
        '"\\udc00\\ud800"',
        '"\x1b"',
        "'a'",
        "",
        '"\ttab"',
        '{"a":}',
        "[1,]",
        "undefined",
    ),
    *("[" * 70 + "]" * 70, "[" * 1500 + "]" * 1500, '{"a":' * 90 + "1" + "}" * 90, "[" * 20000),
)
STRINGS = (
    *(
        "",
        " ",
        "a",
        "A",
        "\x00",
        "\x1b[2J\x1b]0;title\x07",
        "a\nb",
        "a\r\nb",
        "\x7f",
        "\x85",
        "\u2028",
    ),
    *("../outside/secret.json", "../../outside/secret.json", "/etc/passwd", "/", ".", "..", "~"),
    *("companions/../../outside/secret.json", "companions/", "C:\\x", "a/b", "file:///etc/passwd"),
    *("[red]x[/red]", "<script>alert(1)</script>", "]]>", "\u202egnp.exe", "\ufeff", "\u200b"),
    *("---\n- evil", "x: y", "|a|b|", "`x`", "${x}", "%s%n", "{0}", "{x}", "e\u0301", "\U0001f600"),
    *("model.safetensors", "model-00001-of-00002.safetensors", "model-00003-of-00002.safetensors"),
    *(
        "<s>",
        "</s>",
        "<|new|>",
        "<|im_start|>",
        "<|reserved_1|>",
        "lm_head.weight",
        "-1",
        "8",
        "1e3",
    ),
    *("model.embed_tokens.weight", "BF16", "F64", "I64", "BOOL", "F4", "own", "tied", "graft"),
    *("x" * 300, "y" * 5000, "(a+)+$", "<" + "a" * 3000, "[" + "reserved" * 300, "\u0130"),
    *("fp8", "compressed-tensors", "bitsandbytes", "mxfp4", "pack-quantized", "float-quantized"),
    *("a.weight_packed", "a.weight_scale", "a.weight_scale_inv", "a.SCB", "a_blocks", "a_scales"),
    *("gptq", "Model", "LlamaModel", "float32", "1" * 25, "\u0661", "\u00b2"),
)
DTYPES = (
    "F64",
    "F32",
    "F16",
    "BF16",
    "I64",
    "I16",
    "U16",
    "I8",
    "U8",
    "BOOL",
    "F8_E4M3",
    "F8_E8M0",
    "F8_E5M2",
    "I32",
    "F4",
    "C64",
)


def mutate(
    rng: Random,
    sound: bytes,
    name: str,
    donors: Sequence[bytes],
    links: Sequence[Link],
    *,
    is_packed: bool = False,
) -> bytes | Link:
    """Break a file.

    Args:
        rng: the source of random choices.
        sound: its bytes.
        name: its name, which determines its format.
        donors: other sound files.
        links: links that may replace it.
        is_packed: whether it is a shard of packed tensors.
    """
    if rng.random() < 0.01:
        return rng.choice(list(links))
    if rng.random() < 0.2:
        return mutate_bytes(rng, sound, donors)
    if name.endswith(".safetensors"):
        return (mutate_packed if is_packed else mutate_shard)(rng, sound, donors)
    if name.endswith(".json"):
        text = mutate_json(rng, json.loads(sound), donors)
        return text if rng.random() < 0.92 else mutate_bytes(rng, text, donors)
    return mutate_bytes(rng, sound, donors)


# Bytes.


def mutate_bytes(rng: Random, raw: bytes, donors: Sequence[bytes]) -> bytes:
    """Flip, cut, insert, double or splice bytes."""
    for _ in range(_few(rng)):
        at = rng.randrange(len(raw) + 1)
        end = min(len(raw), at + rng.choice((1, 1, 2, 4, 8, 64, 1024)))
        chosen = rng.randrange(9)
        if chosen == 0:
            raw = raw[:at]
        elif chosen == 1:
            raw = raw[:at] + raw[end:]
        elif chosen == 2:
            raw = raw[:at] + rng.randbytes(rng.choice((1, 2, 8, 100))) + raw[at:]
        elif chosen == 3:
            raw = raw[:at] + raw[at:end] * rng.choice((2, 3, 50)) + raw[end:]
        elif chosen == 4:
            donor = rng.choice(list(donors))
            raw = raw[:at] + donor[rng.randrange(len(donor) + 1) :]
        elif chosen == 5:
            odd = (b"\xef\xbb\xbf", b"\xff\xfe", b"\xc0\x80", b"\xed\xa0\x80", b"\x00", b'"', b"}")
            raw = raw[:at] + rng.choice(odd) + raw[at:]
        elif chosen == 6:
            raw = rng.choice((b"", b"\x00" * 64, b"\xef\xbb\xbf" + raw, raw.upper(), raw + raw))
        elif at < len(raw):
            flipped = raw[at] ^ (1 << rng.randrange(8))
            raw = raw[:at] + bytes([flipped]) + raw[at + 1 :]
    return raw


def _few(rng: Random) -> int:
    return 1 + min(5, int(rng.expovariate(1.2)))


# JSON.


def mutate_json(rng: Random, document: Any, donors: Sequence[bytes]) -> bytes:
    """Change values and keys of a document, usually so that it stays valid JSON."""
    holder = [document]
    for _ in range(_few(rng)):
        _change(rng, holder, donors)
    return dump(rng, holder[0])


def dump(rng: Random, document: Any) -> bytes:
    """The document's text, in one of the styles that JSON has."""
    raws: list[str] = []

    def default(value: Any) -> Any:
        raws.append(value.text)
        return f"\x01raw{len(raws) - 1}\x01"

    indent = rng.choice((None, None, 1, 2, "\t"))
    text = json.dumps(document, default=default, indent=indent, ensure_ascii=rng.random() < 0.5)
    for place, raw in enumerate(raws):
        text = text.replace(f'"\\u0001raw{place}\\u0001"', raw)
    return text.encode("utf-8", "surrogatepass")


def _places(node: Any) -> list[tuple[Any, Any]]:
    """Every container and key below a node."""
    found: list[tuple[Any, Any]] = []
    items = node.items() if isinstance(node, dict) else enumerate(node)
    for key, value in items:
        found.append((node, key))
        if isinstance(value, dict | list):
            found += _places(value)
    return found


def _change(rng: Random, holder: list[Any], donors: Sequence[bytes]) -> None:
    places = _places(holder)
    container, key = rng.choice(places)
    if rng.random() < 0.3:  # the upper levels are few among all, and matter most
        container, key = rng.choice([p for p in places if p[0] is holder[0] or p[0] is holder])
    chosen = rng.randrange(12)
    if chosen <= 4:
        container[key] = any_value(rng, container[key])
    elif chosen == 5:
        other, there = rng.choice(places)
        container[key], other[there] = other[there], container[key]
        _uncurl(holder)
    elif chosen == 6:
        container[key] = _donated(rng, donors)
    elif chosen == 7 and isinstance(container[key], list | dict):
        _grow(rng, container, key)
    elif isinstance(container, dict):
        _rekey(rng, container, key)
    elif container is not holder:
        del container[key]


def _uncurl(holder: list[Any]) -> None:
    """Remove cycles: a swap may have put a container into itself, which JSON cannot express."""
    try:
        json.dumps(holder, default=str)
    except (ValueError, RecursionError):
        holder[0] = {}


def any_value(rng: Random, old: Any) -> Any:
    """A value that is wrong, or nearly right."""
    if type(old) is int and rng.random() < 0.5:
        near = (old + 1, old - 1, -old, float(old), str(old), [old], old * 2, old == 1, old << 32)
        return rng.choice(near)
    if type(old) is str and rng.random() < 0.4:
        near = (old.upper(), old.title(), old[:-1], old + old, [old], {"content": old}, old + " ")
        return rng.choice((*near, old[::-1], old + "\x1b[31m", {"content": [old]}))
    chosen = rng.randrange(6)
    if chosen == 0:
        return rng.choice(NUMBERS)
    if chosen == 1:
        return Raw(rng.choice(LITERALS if rng.random() < 0.8 else WRONG))
    if chosen == 2:
        return rng.choice((None, True, False, [], {}, [[]], {"": {}}, [None], [[], {}], {"a": []}))
    if chosen == 3:
        return [rng.choice((*NUMBERS, *STRINGS)) for _ in range(rng.randrange(4))]
    if chosen == 4:
        return {rng.choice(STRINGS): rng.choice((*NUMBERS, None)) for _ in range(rng.randrange(4))}
    return rng.choice(STRINGS)


def _donated(rng: Random, donors: Sequence[bytes]) -> Any:
    """A part of another file."""
    document = None
    while document is None:
        try:
            document = json.loads(rng.choice(list(donors)))
        except ValueError:
            continue
    container, key = rng.choice(_places([document]))
    return container[key]


def _grow(rng: Random, container: Any, key: Any) -> None:
    """Wrap, double or fill a container."""
    old = container[key]
    chosen = rng.randrange(4)
    if chosen == 0:
        container[key] = [old]
    elif chosen == 1:
        container[key] = {"content": old}
    elif isinstance(old, list):
        container[key] = old + old if chosen == 2 else old + [any_value(rng, None)] * 200
    elif chosen == 2:
        container[key] = [[name, value] for name, value in old.items()]
    else:
        container[key] = {**old, **{f"k{place}": place for place in range(200)}}


def _rekey(rng: Random, container: dict[str, Any], key: str) -> None:
    """Remove, rename or double a member."""
    value = container.get(key)
    chosen = rng.randrange(5)
    if chosen == 0:
        del container[key]
    elif chosen == 1:
        del container[key]
        container[rng.choice((key.upper(), key + " ", key[:-1], *STRINGS))] = value
    elif chosen == 2:
        container[rng.choice(STRINGS)] = value
    elif chosen == 3:
        container[rng.choice(list(container))] = value
    else:  # twice the same key: the second with another value
        other = json.dumps(any_value(rng, None), default=lambda raw: raw.text)
        inside = json.dumps(value, default=lambda raw: raw.text)
        container[key] = Raw(f"{inside}, {json.dumps(key)}: {other}")


# Shards.


def mutate_shard(rng: Random, raw: bytes, donors: Sequence[bytes]) -> bytes:
    """Change what a header says, its length, or the data."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    chosen = rng.randrange(10)
    if chosen == 0:
        text = raw[8 : 8 + length]
        stated = rng.choice((0, 1, length - 1, length + 1, len(raw), *_sizes(rng)))
        return struct.pack("<Q", stated % (1 << 64)) + text + data
    if chosen == 1:
        data = mutate_bytes(rng, data, donors)
    elif chosen == 2:
        at = rng.randrange(len(data) + 1) & ~1
        data = (
            data[:at]
            + rng.choice((b"\xc0\x7f", b"\x80\x7f", b"\xff\xff", b"\x7f\x7f"))
            + data[at + 2 :]
        )
    elif chosen <= 4:
        return _with_header(mutate_json(rng, header, donors), data)
    else:
        for _ in range(_few(rng)):
            names = [name for name in header if name != "__metadata__"]
            if names:
                _HEADER_CHANGES[rng.randrange(len(_HEADER_CHANGES))](rng, header, rng.choice(names))
    return _with_header(dump(rng, header), data)


def mutate_packed(rng: Random, raw: bytes, donors: Sequence[bytes]) -> bytes:
    """Change one packed tensor of a shard, and state its new size everywhere."""
    (length,) = struct.unpack("<Q", raw[:8])
    header, data = json.loads(raw[8 : 8 + length]), raw[8 + length :]
    header.pop("__metadata__", None)
    names = [name for name in header if header[name]["dtype"] == "U8"]
    if not names or rng.random() < 0.2:
        return mutate_shard(rng, raw, donors)
    chosen, parts = rng.choice(names), []
    for name in sorted(header, key=lambda name: header[name]["data_offsets"]):
        begin, end = header[name]["data_offsets"]
        part = data[begin:end]
        part = _mutate_tensor(rng, part, donors) if name == chosen else part
        begin = sum(map(len, parts))
        header[name]["data_offsets"] = [begin, begin + len(part)]
        if name == chosen:
            header[name]["shape"] = [len(part)]
        parts.append(part)
    return _with_header(json.dumps(header).encode(), b"".join(parts))


def _mutate_tensor(rng: Random, raw: bytes, donors: Sequence[bytes]) -> bytes:
    """Change the head, the sizes or a block of a packed tensor."""
    (elements,) = struct.unpack("<Q", raw[8:16])
    table = 16 + 4 * -(-elements // (1 << 18))
    blocks = []
    at = table
    for size in struct.unpack(f"<{(table - 16) // 4}I", raw[16:table]):
        blocks.append(raw[at : at + size])
        at += size
    chosen = rng.randrange(10)
    if chosen == 0 or not blocks:
        return mutate_bytes(rng, raw, donors)
    if chosen == 1:
        return mutate_bytes(rng, raw[:table], donors) + raw[table:]
    place = rng.randrange(len(blocks))
    blocks[place] = _mutate_block(rng, blocks[place], donors)
    sizes = struct.pack(f"<{len(blocks)}I", *map(len, blocks))
    return raw[:16] + sizes + b"".join(blocks)


def _mutate_block(rng: Random, block: bytes, donors: Sequence[bytes]) -> bytes:
    """Change the form, the bits or a frame of a block; the frame often by what is in it."""
    form, size = struct.unpack("<BI", block[:5])
    exceptions, stated = b"", 0
    if form & 0x80:
        (stated,) = struct.unpack("<I", block[-4:])
        exceptions, block = block[-4 - stated : -4], block[: -4 - stated]
    bits, frame = block[5 : 5 + size], block[5 + size :]
    chosen = rng.randrange(9)
    if rng.random() < (0.5 if exceptions else 0.05):
        exceptions, stated = _mutate_exceptions(rng, exceptions, donors)
        form |= 0x80
    elif chosen == 0:
        form = rng.choice((*range(7), *range(0x80, 0x87), form ^ 0x80, 255))
    elif chosen == 1:
        size = rng.choice((0, 1, max(0, size - 1), size + 1, len(block), 1 << 31, (1 << 32) - 1))
    elif chosen == 2:
        bits = mutate_bytes(rng, bits, donors)
        size = len(bits)
    elif chosen == 3:
        frame = mutate_bytes(rng, frame, donors)
    elif chosen == 4:
        frame = zstandard.compress(bytes(rng.choice((0, 1, 1 << 16, 1 << 28))))
    else:
        content = bytearray(zstandard.decompress(frame))
        if rng.random() < 0.5:
            # A table ends the content; its numbers are of 2 bytes.
            at = max(0, len(content) - 2 * rng.randrange(1, 769))
            content[at : at + 2] = struct.pack("<h", rng.choice(_TABLED))
        else:
            content = bytearray(mutate_bytes(rng, bytes(content), donors))
        writer = zstandard.ZstdCompressor(write_content_size=rng.random() < 0.9)
        frame = writer.compress(bytes(content))
    end = exceptions + struct.pack("<I", stated) if exceptions else b""
    return struct.pack("<BI", form, size) + bits + frame + end


def _mutate_exceptions(
    rng: Random, exceptions: bytes, donors: Sequence[bytes]
) -> tuple[bytes, int]:
    """Change the frame of exceptions by what is in it, or its size."""
    chosen = rng.randrange(5)
    if chosen == 0 and exceptions:
        return exceptions, rng.choice((0, 1, len(exceptions) - 1, len(exceptions) + 1, 1 << 31))
    if chosen == 1:
        made = mutate_bytes(rng, exceptions, donors)
    elif chosen == 2:
        made = zstandard.compress(bytes(rng.choice((0, 1, 1 << 16, 1 << 28))))
    else:
        content = zstandard.decompress(exceptions) if exceptions else rng.randbytes(14)
        content = mutate_bytes(rng, content, donors)
        made = zstandard.ZstdCompressor(write_checksum=rng.random() < 0.5).compress(content)
    return made, len(made)


_TABLED = (0, 1, -1, 2, 22, 23, 24, 25, 52, 53, 54, 57, 63, 64, 65, 255, 256, -2000, 32767, -32768)


def _with_header(text: bytes, data: bytes) -> bytes:
    return struct.pack("<Q", len(text)) + text + data


def _sizes(rng: Random) -> list[int]:
    far = (1 << 31, 1 << 32, 1 << 40, 1 << 53, (1 << 63) - 1, 1 << 63, (1 << 64) - 1, 100_000_001)
    return list(rng.sample(far, 3))


def _offsets(rng: Random, header: dict[str, Any], name: str) -> None:
    """Overlap, leave a hole, overflow, reverse."""
    entry = header[name]
    if not (isinstance(entry, dict) and isinstance(entry.get("data_offsets"), list)):
        return
    offsets = entry["data_offsets"]
    if len(offsets) != 2 or not all(type(value) is int for value in offsets):
        return
    begin, end = offsets
    step = rng.choice((1, 2, 8, -1, -2, -8, 1 << 32))
    new = (
        [begin + step, end + step],
        [begin, end + step],
        [end, begin],
        [begin, begin],
        [-begin - 1, end],
        [_sizes(rng)[0], _sizes(rng)[1]],
        [begin + (1 << 64), end + (1 << 64)],
        [begin, _sizes(rng)[0]],
        [float(begin), end],
        [begin, end, end],
    )
    entry["data_offsets"] = rng.choice(new)


def _reshape(rng: Random, header: dict[str, Any], name: str) -> None:
    """Change the shape, usually with the same number of elements."""
    entry = header[name]
    if not (isinstance(entry, dict) and isinstance(entry.get("shape"), list)):
        return
    shape = entry["shape"]
    if not all(type(size) is int for size in shape):
        return
    elements = math.prod(shape)
    even = elements // 2
    new = (
        shape[::-1],
        [elements],
        [1, *shape],
        [*shape, 1],
        [2, even],
        [even, 2],
        [elements] + [1] * 63,
    )
    wrong = (
        [],
        [0],
        [-1, -elements],
        [1 << 40],
        [1 << 62, 1 << 62],
        [0, 1 << 62],
        [1] * 65,
        [True],
    )
    entry["shape"] = list(rng.choice(new if rng.random() < 0.7 else wrong))


def _retype(rng: Random, header: dict[str, Any], name: str) -> None:
    if isinstance(header[name], dict):
        same = ("F16", "I16", "U16")
        header[name]["dtype"] = rng.choice(same if rng.random() < 0.6 else DTYPES)


def _rename(rng: Random, header: dict[str, Any], name: str) -> None:
    new = (name.removeprefix("model."), "language_model." + name, name + "\x1b[31m", name.upper())
    header[rng.choice((*new, *STRINGS))] = header.pop(name)


def _swap(rng: Random, header: dict[str, Any], name: str) -> None:
    other = rng.choice([each for each in header if each != "__metadata__"])
    header[name], header[other] = header[other], header[name]


def _add_empty(rng: Random, header: dict[str, Any], name: str) -> None:
    """Add a tensor without elements."""
    end = rng.choice((0, 24, 96, 120))
    shape = rng.choice(([0], [0, 4], [1 << 62, 0], [0] * 64, [8, 0]))
    entry = {"dtype": rng.choice(DTYPES), "shape": shape, "data_offsets": [end, end]}
    header[rng.choice((*STRINGS, name + ".bias"))] = entry


def _metadata(rng: Random, header: dict[str, Any], name: str) -> None:
    del name
    odd = ({"format": "pt", "\x1b": "x"}, {"format": 1}, [], None, "pt", {}, {"a": "b" * 9000})
    header["__metadata__"] = rng.choice(odd)


def _drop(rng: Random, header: dict[str, Any], name: str) -> None:
    del rng
    del header[name]


_HEADER_CHANGES: tuple[Callable[[Random, dict[str, Any], str], None], ...] = (
    _offsets,
    _offsets,
    _reshape,
    _retype,
    _rename,
    _swap,
    _add_empty,
    _metadata,
    _drop,
)
