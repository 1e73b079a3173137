"""Figures as files, whole or not there: figures.save(figure, 'out/curves') writes curves.png and curves.svg."""
import io

from files import write_atomically


def pyplot():
    """matplotlib.pyplot, which opens no window."""
    import matplotlib    # not above: it takes a second
    matplotlib.use('Agg')
    import matplotlib.pyplot
    return matplotlib.pyplot


def save(figure, stem):
    """Write a matplotlib figure as stem.png and stem.svg and close it. WriteError where it cannot, on a full disk."""
    try:
        for kind in ('png', 'svg'):
            buffer = io.BytesIO()
            figure.savefig(buffer, format=kind, dpi=120)
            write_atomically(f'{stem}.{kind}', buffer.getvalue())
    finally:
        pyplot().close(figure)
