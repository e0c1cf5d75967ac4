from whence.plots.style import save
from whence.plots.training import training_curves, training_figure


def row(step, **values):
    empty = dict.fromkeys(("loss", "eval_loss", "learning_rate", "grad_norm", "samples_per_second"))
    return {"step": step, "epoch": step / 4, **empty, "memory_bytes": 2**30 * (1 + step), "seconds": 1.0 + step, **values}


METRICS = [
    row(0, eval_loss=5.0),
    row(2, loss=4.0, learning_rate=1e-3, samples_per_second=20.0),
    row(4, loss=3.0, learning_rate=5e-4, samples_per_second=30.0, eval_loss=3.5),
]


def test_curves_hold_what_was_measured_and_where():
    curves = training_curves(METRICS, [2e-3, 1e-3, 7e-4, 5e-4])
    assert {name: (curve.steps, curve.values) for name, curve in curves.items()} == {
        "loss": ([2, 4], [4.0, 3.0]),
        "eval_loss": ([0, 4], [5.0, 3.5]),
        "memory": ([0, 2, 4], [1.0, 3.0, 5.0]),
        "samples_per_second": ([2, 4], [20.0, 30.0]),
        "learning_rate": ([1, 2, 3, 4], [2e-3, 1e-3, 7e-4, 5e-4]),
    }


def test_the_figure_draws_every_curve(tmp_path):
    curves = training_curves(METRICS, [2e-3, 1e-3, 7e-4, 5e-4])
    drawing = training_figure(curves)
    lines = [line for axes in drawing.axes for line in axes.get_lines()]
    drawn = [(list(line.get_xdata()), list(line.get_ydata())) for line in lines]
    names = ("loss", "eval_loss", "learning_rate", "memory", "samples_per_second")
    assert drawn == [(curves[name].steps, curves[name].values) for name in names]
    assert drawing.axes[2].get_ylim()[0] == 0 and drawing.axes[2].get_ylim()[1] > 5.0
    assert [text.get_text() for text in drawing.axes[0].get_legend().get_texts()] == ["training", "rows held out"]
    assert save(drawing, tmp_path / "training.png").read_bytes().startswith(b"\x89PNG")


def test_without_rows_kept_out_there_is_no_legend():
    drawing = training_figure(training_curves([row(2, loss=4.0, learning_rate=1e-3)], [1e-3]))
    assert drawing.axes[0].get_legend() is None and drawing.axes[1].get_title(loc="left") == "Learning rate"
