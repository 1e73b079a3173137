"""Tables in Markdown, and figures with their standard errors as text."""
import math


def markdown(columns, rows):
    """A table: columns, names; rows, each of as many cells."""
    lines = [columns, ['---'] * len(columns), *rows]
    return '\n'.join(f'| {" | ".join(map(str, cells))} |' for cells in lines)


def value_text(value, error, digits=3, sign=''):
    """'1.234 ±0.005', '?' for an error that is nan, '-' for no value; sign '+': before positive values too."""
    if value is None:
        return '-'
    return f'{value:{sign}.{digits}f} ±' + ('?' if math.isnan(error) else f'{error:.{digits}f}')
