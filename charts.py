"""The chart of an evaluation's times, and the sheet of its wrong pictures."""

import textwrap
import warnings
from pathlib import Path

import cv2

from classification import RequestError, one_line, read_picture
from common import whole_file


def draw(path, function, *args):
    """Draw a PNG. What can't be drawn is left out with a line: the figures are written already."""
    try:
        import matplotlib

        path.unlink(missing_ok=True)  # an older one
        with matplotlib.rc_context({"text.parse_math": False}), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of each letter that no font has
            function(path, *args)
    except Exception as error:  # whatever matplotlib raises
        print(f"{path}: left out: {type(error).__name__}: {one_line(error)}")


def draw_times(path, numbers, times, title):
    """Draw the inference time of each batch, and the median.

    numbers: of the batches; times: (ms of each, median, name) of each network.
    """
    # Figure, not pyplot: it needs no display and no choice of a backend
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.add_subplot(xlabel="batch", ylabel="ms per picture")
    axes.set_title("\n".join(textwrap.wrap(title, 80)))
    for number, (ms, median, name) in enumerate(times):
        label, color = f"{name}: median {median:.2f} ms", f"C{number}"
        axes.plot(numbers, ms, color=color, marker=".", label=label)
        axes.axhline(median, color=color, linestyle="--", linewidth=1)
    axes.set_ylim(bottom=0, top=1.15 * axes.get_ylim()[1])
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=2)
    with whole_file(path) as part:
        figure.savefig(part, dpi=120)
    print(f"chart: {path}")


def draw_wrong(path, rows, root, names, title):
    """Draw the pictures of these rows with the names of their labels and of PyTorch's answers."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.font_manager import FontProperties

    shown = []
    for row in rows:
        answer = f"PyTorch: {100 * row.pytorch_probability:.0f} %, {names[row.pytorch_class]}"
        captions = [row.picture, f"label: {names[row.label]}", answer]
        captions = ["".join(c if c.isprintable() else "?" for c in text) for text in captions]
        try:
            shown.append((read_picture(Path(root, row.picture)), captions))
        except RequestError as error:  # deleted meanwhile, for instance
            print(f"{path}: left out: {error}")
    if not shown:
        return
    letters = {letter for _, captions in shown for letter in "".join(captions)}
    matplotlib.rcParams["font.family"] = find_fonts(path, letters)
    lines = -(-len(shown) // 4)
    figure = Figure(figsize=(12, 0.6 + 3.6 * lines), dpi=100, layout="constrained")
    figure.suptitle("\n".join(textwrap.wrap(title, 90)), fontsize=14)
    renderer, font = FigureCanvasAgg(figure).get_renderer(), FontProperties(size=10)
    measure = lambda text: renderer.get_text_width_height_descent(text, font, False)[0]  # noqa: E731
    for place, (picture, captions) in enumerate(shown, 1):
        zoom = 400 / max(picture.shape)
        size = [max(1, round(zoom * side)) for side in picture.shape[1::-1]]
        axes = figure.add_subplot(lines, 4, place, box_aspect=1, xticks=[], yticks=[])
        axes.set_frame_on(False)
        axes.imshow(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)[:, :, ::-1])
        axes.set_aspect("equal", adjustable="datalim")
        axes.set_xlabel("\n".join(shorten(text, measure) for text in captions), fontsize=10)
    with whole_file(path) as part:
        figure.savefig(part)
    print(f"wrong pictures: {path}")


def find_fonts(path, letters):
    """Families of installed fonts that have all the letters; it's said if the PNG lacks some."""
    from matplotlib.font_manager import fontManager, get_font

    missing, families = {ord(letter) for letter in letters}, []
    for font in sorted(fontManager.ttflist, key=lambda font: font.name != "DejaVu Sans"):
        # matplotlib's "Last Resort" has a box for everything
        found = missing & get_font(font.fname).get_charmap().keys() if missing else set()
        if found and not font.name.startswith("Last Resort"):
            families.append(font.name)
            missing -= found
    if missing:
        some = ", ".join(f"U+{code:04X}" for code in sorted(missing)[:3])
        hint = "install one (fonts-noto-cjk has Chinese, Japanese and Korean)"
        print(f"{path}: no installed font has {some} ...: {hint}")
    return families


def shorten(text, measure, limit=280):
    """The text without its middle, so that it's at most `limit` wide, in px."""
    short, kept = text, len(text)
    while measure(short) > limit:
        kept -= 1
        short = f"{text[: (kept + 1) // 2]}...{text[len(text) - kept // 2 :]}"
    return short
