"""RESULTS.md: torchvision's classifiers and timm's, converted and compared on each engine.

    python tests/results_table.py                     # torchvision's 80, about half an hour
    python tests/results_table.py --timm              # a network of each of timm's families
    python tests/results_table.py resnet18 timm.xcit  # these, and what was measured before

Random seeded weights. timm isn't in the requirements: pip install it for its table. Each network is
measured in a process of its own, and what is measured is kept in logs/results_table.jsonl: a run
that was stopped continues there, one with other versions starts over.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import json
import platform
import re
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path

import cv2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from classification import RequestError, get_blob, make_parser, read_picture, run  # noqa: E402
from common import NetworksDisagree, whole_file  # noqa: E402
from conversion import NotConvertible, check_branches, export, rewrite  # noqa: E402
from locate import locate  # noqa: E402
from networks import Request, get_torchvision_names, load_network, run_pytorch  # noqa: E402
from verify import get_references, time_pass, verify_engine  # noqa: E402

RECORDS = Path("logs") / "results_table.jsonl"
TABLE = ROOT / "RESULTS.md"
CHART = ROOT / "images" / "results.png"
PICTURE = ROOT / "test_data" / "cls" / "red_panda.jpg"
TIMM = "timm."  # a family of timm's: timm.resnet
EXPORTERS = {"TorchScript": False, "new": True}  # whether it is the new one
ENGINES = ("new", "classic")


def get_versions():
    versions = {name: importlib.metadata.version(name) for name in ("torch", "torchvision", "onnx")}
    return versions | {
        "opencv": cv2.__version__,
        "processor": get_processor(),
        "threads": cv2.getNumThreads(),
    }


def get_processor():
    """The processor's name; platform.processor() has none on Linux."""
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def get_timm_version():
    try:
        return importlib.metadata.version("timm")
    except importlib.metadata.PackageNotFoundError:
        return ""


def get_timm_families():
    """timm's modules of networks, each with the prefix TIMM."""
    import timm

    return [TIMM + module for module in timm.list_modules()]


def load_timm_network(family):
    """The network with the fewest parameters of one of timm's modules.

    One for pictures of up to 288 px, if there is one.
    """
    import timm
    import torch

    sizes = {}
    for name in timm.list_models(module=family, exclude_filters="test_*"):
        config = timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()
        with contextlib.suppress(Exception), torch.device("meta"):
            parameters = sum(p.numel() for p in timm.create_model(name).parameters())
            sizes[name] = max(config.input_size[1:]) > 288, parameters
    name = min(sizes, key=sizes.get)
    sys.modules["timm_network"] = module = types.ModuleType("timm_network")
    setattr(module, name, functools.partial(timm.create_model, name))
    return load_network(Request(f"timm_network:{name}", "random"))


def measure(name):
    """The record of one network: export, both engines, times."""
    if name.startswith(TIMM):
        network = load_timm_network(name.removeprefix(TIMM))
    else:
        network = load_network(Request(name, "random"))
    model, size = network.model, network.preprocessing.width
    blob = get_blob(read_picture(PICTURE), network.preprocessing)
    references = get_references(model, blob)
    record = {"network": name, "member": network.request.name.rpartition(":")[2], "input": size}
    record["date"] = str(datetime.date.today())
    record |= {
        "versions": get_versions(),
        "pytorch_ms": 1000 * time_pass(lambda: run_pytorch(model, blob)),
    }
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{name}.onnx"
        for exporter, dynamo in EXPORTERS.items():
            try:
                check_branches(model, blob)
                start = time.perf_counter()
                export(model, path, blob.shape, dynamo)
                rewrite(path)
                seconds = time.perf_counter() - start
            except NotConvertible as error:
                record["failure"] = str(error)
                break
            except RequestError as error:
                record["failure"] = str(error)
                continue
            record |= {"exporter": exporter, "export_s": seconds}
            # over 2 GB the weights lie beside the file
            files = [path, Path(f"{path}.data")]
            record["mb"] = sum(f.stat().st_size for f in files if f.exists()) / 2**20
            record["engines"] = {e: measure_engine(path, e, references) for e in ENGINES}
            if any("relative" in engine for engine in record["engines"].values()):
                break
    return record


def measure_engine(path, engine, references):
    try:
        differences, seconds = verify_engine(path, engine, references)
    except NetworksDisagree as error:
        return {"failure": str(error), "where": locate(path, engine, references)}
    return {
        "relative": max(d.relative for d in differences),
        "same_class": sum(d.same_class for d in differences),
        "pictures": sum(d.pictures for d in differences),
        "ms": 1000 * seconds,
    }


def read_records():
    """{network: record} of these versions."""
    if not RECORDS.exists():
        return {}
    records = map(json.loads, RECORDS.read_text().splitlines())
    versions = get_versions()
    return {record["network"]: record for record in records if record["versions"] == versions}


def describe_engine(engine):
    """The cells of one engine: relative error, class agreement, ms a picture."""
    if "failure" in engine:
        for word in ("crashes", "can't read", "can't run"):
            if word in engine["failure"]:
                return [word, "", ""]
        return ["wrong", "", ""]
    agreement = f"{engine['same_class']} of {engine['pictures']}"
    return [f"{engine['relative']:.1e}", agreement, f"{engine['ms']:.1f}"]


def get_name(record):
    """torchvision's name, or timm's family and name."""
    family = record["network"].removeprefix(TIMM)
    return f"{family}: {record['member']}" if family != record["network"] else family


def get_summary(records):
    """What the table of these records says, in sentences."""
    measured = [r for r in records if "engines" in r]
    right = {e: [r for r in measured if "relative" in r["engines"][e]] for e in ENGINES}
    either = [r for r in measured if r in right["new"] or r in right["classic"]]
    errors = {
        get_name(r): min(e["relative"] for e in r["engines"].values() if "relative" in e)
        for r in either
    }
    worst = max(errors, key=errors.get)
    faster = [
        get_name(r)
        for r in right["classic"]
        if r in right["new"] and r["engines"]["classic"]["ms"] < r["engines"]["new"]["ms"]
    ]
    lines = [
        f"{len(either)} of {len(records)} networks give PyTorch's answer in OpenCV: "
        f"{len(right['new'])} on the new engine, {len(right['classic'])} on the classic one.",
        f"The largest relative error on the better engine: {errors[worst]:.1e} ({worst}).",
        f"The classic engine is faster for {len(faster)}: {', '.join(faster) or 'none'}.",
    ]
    if large := [get_name(r) for r in measured if r["mb"] >= 2**11]:
        lines.append(
            "Over 2 GB, with the weights in a second file beside the .onnx, which OpenCV 4 can't "
            f"read: {', '.join(large)}."
        )
    if others := [get_name(r) for r in measured if r["exporter"] != "TorchScript"]:
        lines.append(f"Exported by PyTorch's new exporter: {', '.join(others)}.")
    return lines


def get_table(records):
    """The lines of one table, and of what fails in it."""
    lines = [
        "| network | input | export, s | file, MB | new engine: relative error | class | ms | "
        "classic engine: relative error | class | ms | PyTorch, ms |",
        "| --- |" + " ---: |" * 10,
    ]
    failures = {}
    for record in records:
        if "engines" not in record:
            failures.setdefault(record["failure"], []).append(get_name(record))
            continue
        cells = [get_name(record), str(record["input"])]
        cells += [f"{record['export_s']:.1f}", f"{record['mb']:.0f}"]
        for engine, result in record["engines"].items():
            cells += describe_engine(result)
            if "failure" in result:
                # without the node's name, which differs from network to network
                where = re.sub(r"^([A-Z]\w+) .*?(, after [\w ]+)?:.*", r"\1\2", result["where"])
                text = f"{engine} engine: {result['failure']}; first wrong node: {where}"
                failures.setdefault(text, []).append(get_name(record))
        cells.append(f"{record['pytorch_ms']:.1f}")
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "What fails, and where:", ""]
    return lines + [f"* {', '.join(names)}: {text}" for text, names in failures.items()]


def get_section(title, records, chart=()):
    """The lines of one set of networks; prints what they say."""
    summary = get_summary(records)
    print(title, *summary, sep="\n")
    lines = ["", f"## {title}", "", *(f"* {line}" for line in summary), *chart]
    return [*lines, "", *get_table(records)]


def write_tables(records):
    versions = get_versions()
    dates = sorted({record["date"] for record in records})
    lines = [
        "# Classifiers of torchvision and timm in OpenCV",
        "",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} by "
        "`python tests/results_table.py`, and with `--timm`: "
        f"OpenCV {versions['opencv']}, PyTorch {versions['torch']}, onnx {versions['onnx']}; "
        f"{versions['processor']}, {versions['threads']} threads.",
        "",
        "Seeded random weights, on a photograph, a dark, a bright and a grey copy of it, noise, "
        "zeros, and the photograph in 0 to 255, unless PyTorch's answer to that hangs on rounding. "
        "*relative error* is max|a - b| / max|a| of the logits; *class* is how many of the eight "
        "or seven pictures get the same class from both. The file takes any batch size; an engine "
        "that runs it for one picture but not for three counts as one that can't run it. *ms* is "
        "one forward pass with one picture, the least of several.",
    ]
    torchvision = [r for r in records if not r["network"].startswith(TIMM)]
    timm = [r for r in records if r["network"].startswith(TIMM)]
    if torchvision:
        draw_chart(torchvision)
        chart = ["", f"![OpenCV's time against PyTorch's](images/{CHART.name})"]
        title = f"Every classifier of torchvision {versions['torchvision']}"
        lines += get_section(title, torchvision, chart)
    if timm:
        lines += get_section(f"A network of each of timm's {get_timm_version()} families", timm)
    with whole_file(TABLE) as part:
        part.write_text("\n".join([*lines, ""]), "utf-8")
    print(f"written: {TABLE}")


def draw_chart(records):
    """OpenCV's time, on the faster engine that is right, against PyTorch's: a family, a marker."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.4, 6), layout="constrained")
    axes = figure.add_subplot(xscale="log", yscale="log")
    axes.set_xlabel("PyTorch, ms per picture", fontsize=12)
    axes.set_ylabel("OpenCV, ms per picture", fontsize=12)
    families = {}
    for record in records:
        times = [e["ms"] for e in record["engines"].values() if "ms" in e]
        if times:
            family = re.match(r"wide_resnet|efficientnet_v2|[a-z]+", record["network"]).group()
            families.setdefault(family, []).append((record["pytorch_ms"], min(times)))
    for number, (family, points) in enumerate(families.items()):
        marker = "os^D"[number // 10 % 4]
        axes.plot(
            *zip(*points, strict=True),
            marker,
            color=f"C{number % 10}",
            label=family,
            markeredgecolor="white",
        )
    limits = [f(v for p in families.values() for xy in p for v in xy) for f in (min, max)]
    limits = [limits[0] / 1.3, limits[1] * 1.3]
    axes.plot(limits, limits, "--", color="grey", linewidth=1, zorder=0)
    axes.set(xlim=limits, ylim=limits)
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")
    axes.text(0.97, 0.03, "OpenCV is faster", transform=axes.transAxes, ha="right", fontsize=12)
    axes.text(0.03, 0.95, "PyTorch is faster", transform=axes.transAxes, fontsize=12)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right center", fontsize=11, frameon=False)
    with whole_file(CHART) as part:
        figure.savefig(part, dpi=120, format="png")


def measure_apart(name):
    """The record of one network, from a process of its own."""
    child = subprocess.run(
        [sys.executable, __file__, "--one", name], capture_output=True, text=True
    )
    if child.returncode == 0:
        return json.loads(child.stdout.splitlines()[-1])
    lines = child.stderr.splitlines() or [f"exit code {child.returncode}"]
    failure = lines[-1].partition("error: ")[2] or lines[-1]
    if child.returncode < 0:
        failure = f"killed by signal {-child.returncode}, which is 9 if the memory is full"
    record = {"network": name, "member": "", "date": str(datetime.date.today())}
    return record | {"versions": get_versions(), "failure": failure}


def main():
    parser = make_parser(__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help="networks (default: torchvision's)"
    )
    parser.add_argument("--timm", action="store_true", help="a network of each of timm's families")
    parser.add_argument("--one", metavar="NAME", help="only print what is measured of this one")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    records = read_records()
    names = args.names or (get_timm_families() if args.timm else get_torchvision_names())
    RECORDS.parent.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        if name in records:
            continue
        records[name] = record = measure_apart(name)
        with open(RECORDS, "a") as file:
            file.write(json.dumps(record) + "\n")
        cells = [f"{e} {describe_engine(r)[0]}" for e, r in record.get("engines", {}).items()]
        found = ", ".join(cells) or record["failure"]
        print(f"{number} of {len(names)}: {get_name(record)}: {found}", flush=True)
    write_tables([records[name] for name in sorted(records)])
    return 0


if __name__ == "__main__":
    run(main)
