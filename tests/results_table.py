"""RESULTS.md: torchvision's classifiers and timm's, converted, compared and timed.

    python tests/results_table.py                     # torchvision's 80, an hour or two
    python tests/results_table.py --timm              # a network of each of timm's families
    python tests/results_table.py resnet18 timm.xcit  # these, and what was measured before
    python tests/results_table.py --wall              # ten networks again, with all threads

Random seeded weights. timm isn't in the requirements: pip install it for its table. Each network is
measured in a process of its own, and what is measured is kept in logs/results_table.jsonl: a run
that was stopped continues there, one with other versions starts over. CPU time on one thread is
hardly disturbed by other programs; --wall waits until there are none.
"""

import contextlib
import datetime
import functools
import importlib.metadata
import io
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import types
from pathlib import Path
from unittest import mock

import cv2

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import conversion  # noqa: E402
import verify  # noqa: E402
from classification import ENGINES, RequestError, get_blob, make_parser, read_picture, run  # noqa: E402
from common import whole_file  # noqa: E402
from networks import Request, get_torchvision_names, load_network  # noqa: E402

RECORDS = Path("logs") / "results_table.jsonl"
TABLE = ROOT / "RESULTS.md"
CHART = ROOT / "images" / "results.png"
PICTURE = ROOT / "test_data" / "cls" / "red_panda.jpg"
TIMM = "timm."  # a family of timm's: timm.resnet
WALL = "wall."  # a network of torchvision's with all threads: wall.resnet50
TEN = [
    "alexnet", "densenet121", "efficientnet_b0", "mobilenet_v3_large", "regnet_x_8gf", "resnet18",
    "resnet50", "swin_v2_t", "vgg16", "vit_b_16",
]  # fmt: skip
MAX_RATIO = 1.03  # of OpenCV's time to PyTorch's: as fast
# Where the time goes in networks that are slower, by cv2.dnn.Net.getPerfProfile.
SLOW_LAYERS = {
    "convmixer": "1x1 Conv", "mobilenetv5": "ReduceMean over the channels", "qwen3_vit": "Gemm",
    "regnet_y_128gf": "1x1 Conv", "sequencer": "LSTM",
}  # fmt: skip
MAX_BUSY = 0.1  # processors that other programs take on a quiet machine


def get_versions():
    packages = ("torch", "torchvision", "onnx", "onnxruntime")
    versions = {name: importlib.metadata.version(name) for name in packages}
    return versions | {"opencv": cv2.__version__, "processor": get_processor()}


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
    """The record of one network: how far OpenCV's answers are from PyTorch's, and the times."""
    import torch

    threads = os.cpu_count() if name.startswith(WALL) else 1
    if name.startswith(TIMM):
        network = load_timm_network(name.removeprefix(TIMM))
    else:
        network = load_network(Request(name.removeprefix(WALL), "random"))
    model = network.model
    blob = get_blob(read_picture(PICTURE), network.preprocessing)
    references = verify.get_references(model, blob)
    record = {"network": name, "member": network.request.name.rpartition(":")[2]}
    record |= {"date": str(datetime.date.today()), "versions": get_versions()}
    record |= {"input": network.preprocessing.width, "engines": {}}
    with tempfile.TemporaryDirectory() as folder:
        name = conversion.get_onnx_path(network.request).name
        raw, plain = Path(folder, "raw", name), Path(folder, "plain", name)
        raw.parent.mkdir()
        plain.parent.mkdir()

        def rewrite(path, *options):
            """conversion.rewrite; keeps the graph as it is exported, and before the speed-ups."""
            shutil.copy(path, raw)
            if (data := Path(f"{path}.data")).exists():  # the new exporter's weights
                shutil.copy(data, raw.parent)
            kinds = conversion_rewrite(path, *options)
            shutil.copy(path, plain)
            if data.exists():  # over 2 GB
                shutil.copy(data, f"{plain}.data")
                raw.unlink()
            return kinds

        conversion_rewrite = conversion.rewrite
        said = io.StringIO()
        try:
            with (
                mock.patch("entries.MODELS_DIR", folder),
                mock.patch("conversion.rewrite", rewrite),
                contextlib.redirect_stdout(said),
            ):
                converted = conversion.convert(network, references)
        except RequestError as error:
            record["failure"] = str(error)
        for engine, cells in re.findall(r"^(new|classic) engine  +(.+)$", said.getvalue(), re.M):
            is_right = re.fullmatch(r"[\d.e +-]+", cells)  # else words; the last file counts
            errors = cells.split()[:-1]  # without the ms
            found = {"relative": max(map(float, errors))} if is_right else {"failure": cells}
            record["engines"][engine] = found
        if "failure" in record:
            return record
        files = [converted.path, Path(f"{converted.path}.data")]
        record["mb"] = sum(file.stat().st_size for file in files if file.exists()) / 2**20
        is_new = said.getvalue().count("exporting ") == 2  # the third is TorchScript's again
        record["exporter"] = "new" if is_new else "TorchScript"
        record["engine"] = engine = converted.engines[0]
        torch.set_num_threads(threads)
        cv2.setNumThreads(threads)
        record["load_s"] = time_load(converted.path, engine)
        passes = {
            "pytorch": functools.partial(verify.run_pytorch, model, blob),
            "before": functools.partial(verify.run_opencv, read_net(plain, engine), blob),
            "after": functools.partial(verify.run_opencv, read_net(converted.path, engine), blob),
            "onnxruntime": make_onnxruntime(raw if raw.exists() else plain, blob, threads),
        }
        record["threads"] = threads
        if threads > 1:
            wait_until_quiet()
        clock = time.process_time if threads == 1 else time.perf_counter
        # threads that wait for work spin, and would take the processors from the next network
        turns = [passes] if threads == 1 else [{name: passes[name]} for name in passes]
        record["ms"] = {k: ms for turn in turns for k, ms in time_in_turn(turn, clock).items()}
    return record


def wait_until_quiet():
    """Wait until other programs leave the processors alone for two seconds."""
    busy = MAX_BUSY + 1
    while busy > MAX_BUSY:
        before = get_busy_seconds()
        time.sleep(2)
        busy = (get_busy_seconds() - before) / 2


def get_busy_seconds():
    """What all processors have worked since the machine was started; Linux only."""
    words = Path("/proc/stat").read_text().split(maxsplit=9)  # man 5 proc_stat
    user, nice, system, _idle, _iowait, irq, softirq, steal = map(int, words[1:9])
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")


def read_net(path, engine):
    return cv2.dnn.readNetFromONNX(str(path), ENGINES[engine])


def time_load(path, engine):
    """CPU seconds to read a file, alone in a process: other libraries' threads count as well."""
    code = """
import sys, time, cv2
cv2.setNumThreads(1)
times = []
for _ in range(4):  # the first waits for memory
    start = time.process_time()
    cv2.dnn.readNetFromONNX(sys.argv[1], int(sys.argv[2]))
    times.append(time.process_time() - start)
print(min(times))
"""
    command = [sys.executable, "-c", code, str(path), str(ENGINES[engine])]
    env = os.environ | {"OPENBLAS_NUM_THREADS": "1"}  # NumPy's
    child = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return float(child.stdout)


def make_onnxruntime(path, blob, threads):
    """A forward pass of onnxruntime."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = threads, 3
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return functools.partial(session.run, None, {session.get_inputs()[0].name: blob})


def time_in_turn(passes, clock):
    """{name: ms} of forward passes in turn: the least of several, after one of each."""
    times = {name: [] for name in passes}
    for name, forward in passes.items():
        forward()
        last = times[name]
    while len(last) < 4 or (sum(last) < 0.5 and len(last) < 30):
        for name, forward in passes.items():
            start = clock()
            forward()
            times[name].append(clock() - start)
    return {name: 1000 * min(seconds) for name, seconds in times.items()}


def read_records():
    """{network: record} of these versions."""
    if not RECORDS.exists():
        return {}
    records = map(json.loads, RECORDS.read_text().splitlines())
    versions = get_versions()
    return {record["network"]: record for record in records if record["versions"] == versions}


def describe_engine(engine):
    """An engine's relative error, or what it does instead."""
    if "relative" in engine:
        return f"{engine['relative']:.1e}"
    words = ("crashes", "can't read", "can't run")
    return next((word for word in words if word in engine["failure"]), "wrong")


def get_ratio(record, other, own="after"):
    """OpenCV's time in PyTorch's, for instance."""
    return record["ms"][own] / record["ms"][other]


def get_name(record):
    """torchvision's name, or timm's family and name."""
    family = record["network"].removeprefix(TIMM)
    return f"{family}: {record['member']}" if family != record["network"] else family


def get_summary(records):
    """What the table of these records says, in sentences."""
    right = [r for r in records if "ms" in r]
    engines = {e: [r for r in right if "relative" in r["engines"][e]] for e in ("new", "classic")}
    errors = {
        get_name(r): min(e["relative"] for e in r["engines"].values() if "relative" in e)
        for r in right
    }
    worst = max(errors, key=errors.get)
    slower = sorted((get_ratio(r, "pytorch"), r["network"].removeprefix(TIMM)) for r in right)
    slower = [
        f"{name} ({ratio:.2f} x: {SLOW_LAYERS.get(name, 'layer unknown')})"
        for ratio, name in slower[::-1]
        if ratio > MAX_RATIO
    ]
    means = [
        statistics.geometric_mean(get_ratio(r, other, own) for r in right)
        for other in ("pytorch", "onnxruntime")
        for own in ("before", "after")
    ]
    lines = [
        f"{len(right)} of {len(records)} networks give PyTorch's answer in OpenCV: "
        f"{len(engines['new'])} on the new engine, {len(engines['classic'])} on the classic one.",
        f"The largest relative error on the better engine: {errors[worst]:.1e} ({worst}).",
        f"OpenCV takes at most {MAX_RATIO} x PyTorch's time for {len(right) - len(slower)} of "
        f"{len(right)}. It is slower for {', '.join(slower) or 'none'}.",
        "OpenCV's time in PyTorch's, geometric mean: "
        f"{means[0]:.2f} before the speed-ups, {means[1]:.2f} after them.",
        "OpenCV's time in onnxruntime's, geometric mean: "
        f"{means[2]:.2f} before the speed-ups, {means[3]:.2f} after them.",
    ]
    if classic := [get_name(r) for r in right if r["engine"] == "classic"]:
        lines.append(f"The classic engine is faster for {len(classic)}: {', '.join(classic)}.")
    if large := [get_name(r) for r in right if r["mb"] >= 2**11]:
        lines.append(
            "Over 2 GB, with the weights in a second file beside the .onnx, which OpenCV 4 can't "
            f"read: {', '.join(large)}."
        )
    if others := [get_name(r) for r in right if r["exporter"] != "TorchScript"]:
        lines.append(f"Exported by PyTorch's new exporter: {', '.join(others)}.")
    return lines


def get_table(records):
    """The lines of one table, and of what fails in it."""
    lines = [
        "| network | input | file, MB | load, s | new engine: relative error | classic engine | "
        "PyTorch, ms | OpenCV before | OpenCV | onnxruntime | OpenCV / PyTorch |",
        "| --- |" + " ---: |" * 10,
    ]
    failures = {}
    for record in records:
        for engine, result in record.get("engines", {}).items():
            if "failure" in result:
                text = f"{engine} engine: {result['failure']}"
                failures.setdefault(text, []).append(get_name(record))
        if "ms" not in record:
            failures.setdefault(record["failure"], []).append(get_name(record))
            continue
        cells = [get_name(record), str(record["input"]), f"{record['mb']:.0f}"]
        cells += [f"{record['load_s']:.2f}", *map(describe_engine, record["engines"].values())]
        cells += [f"{ms:.1f}" for ms in record["ms"].values()]
        lines.append(f"| {' | '.join(cells)} | {get_ratio(record, 'pytorch'):.2f} |")
    lines += ["", "What fails:", ""]
    return lines + [f"* {', '.join(names)}: {text}" for text, names in failures.items()]


def get_section(title, records, chart=()):
    """The lines of one set of networks; prints what they say."""
    summary = get_summary(records)
    print(title, *summary, sep="\n")
    lines = ["", f"## {title}", "", *(f"* {line}" for line in summary), *chart]
    return [*lines, "", *get_table(records)]


def get_wall_section(records):
    """The lines of the networks that were measured with all threads."""
    threads = records[0]["threads"]
    lines = [
        "",
        f"## Wall time, {threads} threads",
        "",
        "The same with all of the processor's threads, while no other program ran: wall time, ms.",
        "",
        "| network | PyTorch | OpenCV before | OpenCV | onnxruntime | OpenCV / PyTorch |",
        "| --- |" + " ---: |" * 5,
    ]
    for record in records:
        cells = [record["network"].removeprefix(WALL)]
        cells += [f"{ms:.1f}" for ms in record["ms"].values()]
        lines.append(f"| {' | '.join(cells)} | {get_ratio(record, 'pytorch'):.2f} |")
    return lines


def write_tables(records):
    versions = get_versions()
    dates = sorted({record["date"] for record in records})
    lines = [
        "# Classifiers of torchvision and timm in OpenCV",
        "",
        f"Measured {' to '.join(dict.fromkeys((dates[0], dates[-1])))} by "
        "`python tests/results_table.py`, and with `--timm`: "
        f"OpenCV {versions['opencv']}, PyTorch {versions['torch']}, onnx {versions['onnx']}, "
        f"onnxruntime {versions['onnxruntime']}; {versions['processor']}.",
        "",
        "Seeded random weights, on a photograph, a dark, a bright and a grey copy of it, noise, "
        "zeros, and the photograph in 0 to 255, unless PyTorch's answer to that hangs on rounding. "
        "*relative error* is max|a - b| / max|a| of the logits; both networks name the same class "
        "for each picture. The file takes any batch size; an engine that runs it for one picture "
        "but not for three counts as one that can't run it.",
        "",
        "*ms* is the CPU time of one forward pass with one picture and one thread, the four in "
        "turn, the least of several: it counts what a pass computes, and other programs on the "
        "machine hardly change it. *OpenCV before* is the graph without the speed-ups of "
        "onnx_speedups.py; *load* is the CPU time in which OpenCV reads the file, alone in a "
        "process, the least of several.",
    ]
    timm, wall = (
        [r for r in records if r["network"].startswith(prefix)] for prefix in (TIMM, WALL)
    )
    torchvision = [r for r in records if r not in timm + wall]
    wall = [r for r in wall if "ms" in r]
    if torchvision:
        draw_chart(torchvision)
        chart = ["", f"![OpenCV's time against PyTorch's and onnxruntime's](images/{CHART.name})"]
        title = f"Every classifier of torchvision {versions['torchvision']}"
        lines += get_section(title, torchvision, chart)
    if wall:
        lines += get_wall_section(wall)
    if timm:
        lines += get_section(f"A network of each of timm's {get_timm_version()} families", timm)
    with whole_file(TABLE) as part:
        part.write_text("\n".join([*lines, ""]), "utf-8")
    print(f"written: {TABLE}")


def draw_chart(records):
    """OpenCV's time against PyTorch's and against onnxruntime's: a family, a marker."""
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    families = {}
    for record in records:
        if "ms" in record:
            family = re.match(r"wide_resnet|efficientnet_v2|[a-z]+", record["network"]).group()
            families.setdefault(family, []).append(record["ms"])
    times = [ms for points in families.values() for p in points for ms in p.values()]
    limits = [min(times) / 1.3, max(times) * 1.3]
    figure = Figure(figsize=(12, 5.4), layout="constrained")
    panels = figure.subplots(1, 2, sharey=True)
    for axes, (other, name) in zip(
        panels, {"pytorch": "PyTorch", "onnxruntime": "onnxruntime"}.items(), strict=True
    ):
        axes.set(xscale="log", yscale="log", xlim=limits, ylim=limits)
        axes.set_xlabel(f"{name}, CPU ms per picture", fontsize=12)
        for number, (family, points) in enumerate(families.items()):
            axes.plot(
                [point[other] for point in points],
                [point["after"] for point in points],
                "os^D"[number // 10 % 4],
                color=f"C{number % 10}",
                label=family if other == "pytorch" else None,
                markeredgecolor="white",
            )
        axes.plot(limits, limits, "--", color="grey", linewidth=1, zorder=0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:g}")
        corner = {"transform": axes.transAxes, "fontsize": 12}
        axes.text(0.97, 0.03, "OpenCV is faster", ha="right", **corner)
        axes.text(0.03, 0.94, f"{name} is faster", **corner)
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("OpenCV, CPU ms per picture", fontsize=12)
    figure.legend(loc="outside right center", fontsize=11, frameon=False)
    with whole_file(CHART) as part:
        figure.savefig(part, dpi=110, format="png")


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
    parser.add_argument("--wall", action="store_true", help="ten networks, wall time, all threads")
    parser.add_argument("--one", metavar="NAME", help="only print what is measured of this one")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one)))
        return 0
    records = read_records()
    names = args.names or get_torchvision_names()
    if args.timm:
        names = get_timm_families()
    elif args.wall:
        names = [WALL + name for name in TEN]
    RECORDS.parent.mkdir(exist_ok=True)
    for number, name in enumerate(names, 1):
        if name in records:
            continue
        records[name] = record = measure_apart(name)
        with open(RECORDS, "a") as file:
            file.write(json.dumps(record) + "\n")
        cells = [f"{e} {describe_engine(r)}" for e, r in record.get("engines", {}).items()]
        cells += [f"{name} {ms:.1f} ms" for name, ms in record.get("ms", {}).items()]
        found = record.get("failure") or ", ".join(cells)
        print(f"{number} of {len(names)}: {get_name(record)}: {found}", flush=True)
    write_tables([records[name] for name in sorted(records)])
    return 0


if __name__ == "__main__":
    run(main)
