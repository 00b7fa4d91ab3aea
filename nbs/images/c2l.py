"""Draws the diagram of README and notebook 01, c2l.svg beside this file: python nbs/images/c2l.py"""

import argparse
from pathlib import Path

BLUE, ORANGE, GREY, INK = (
    '#0072B2',
    '#D55E00',
    '#6B6B6B',
    '#222222',
)  # Okabe and Ito: told apart by colour-blind readers
FILL = {BLUE: '#E4F1F9', ORANGE: '#FBEADF', GREY: '#F2F2F2'}


def box(x, y, width, height, lines, colour=GREY, dashed=False):
    "A rounded box with centred lines of text, the first one bold"
    dash = ' stroke-dasharray="5 4"' if dashed else ''
    out = [
        f'<rect x="{x}" y="{y}" width="{width}" height="{height}" rx="8" '
        f'fill="{FILL[colour]}" stroke="{colour}" stroke-width="1.6"{dash}/>'
    ]
    top = y + height / 2 - 9 * (len(lines) - 1) + 5
    for i, line in enumerate(lines):
        weight = ' font-weight="bold"' if i == 0 else ''
        out.append(f'<text x="{x + width / 2}" y="{top + 18 * i}" text-anchor="middle"{weight}>{line}</text>')
    return out


def arrow(points, colour=INK, dashed=False):
    "A line through `points` that ends in an arrow head"
    dash = ' stroke-dasharray="5 4"' if dashed else ''
    path = ' L '.join(f'{x} {y}' for x, y in points)
    return [f'<path d="M {path}" fill="none" stroke="{colour}" stroke-width="1.6" marker-end="url(#head)"{dash}/>']


def note(x, y, text, colour=INK, anchor='middle'):
    "A line of smaller text"
    return [f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="12.5" fill="{colour}">{text}</text>']


def diagram():
    "The whole picture, as SVG"
    parts = [
        *box(10, 120, 110, 60, ['radiograph', 'x, no label']),
        *arrow([(120, 140), (140, 140), (140, 60), (168, 60)]),
        *arrow([(120, 160), (140, 160), (140, 240), (168, 240)]),
        *box(170, 35, 110, 50, ['view 1', 'crop, flip, …']),
        *box(170, 215, 110, 50, ['view 2', 'other draws']),
        *arrow([(280, 60), (318, 60)]),
        *arrow([(280, 240), (318, 240)]),
        *box(320, 30, 150, 60, ['student', 'trained by the loss'], BLUE),
        *box(320, 210, 150, 60, ['teacher', 'follows slowly'], ORANGE),
        *arrow([(395, 90), (395, 208)], GREY, dashed=True),
        *note(403, 143, 'after each step: teacher =', GREY, 'start'),
        *note(403, 160, '.999 teacher + .001 student', GREY, 'start'),
        *arrow([(470, 60), (658, 60)], BLUE),
        *note(562, 52, 'query q', BLUE),
        *arrow([(470, 240), (610, 240), (610, 90), (658, 90)], ORANGE),
        *note(536, 232, 'key k', ORANGE),
        *note(636, 112, 'positive', ORANGE),
        *box(660, 210, 170, 60, ['queue', '32,768 earlier keys'], ORANGE),
        *arrow([(610, 240), (658, 240)], ORANGE),
        *arrow([(745, 210), (745, 112)], ORANGE),
        *note(753, 165, 'negatives', ORANGE, 'start'),
        *box(660, 40, 170, 70, ['loss', 'q near its own k,', 'far from the queue']),
        *note(
            10,
            305,
            'C2L adds: two images are mixed; the query of the mixture must be near the key of the mixture, '
            'and near the mixture of the two images’ keys.',
            INK,
            'start',
        ),
    ]
    head = (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 845 320" width="845" height="320" role="img" '
        'aria-label="One training step: two views of a radiograph go through student and teacher; '
        'the query must be near its own key and far '
        'from the keys in the queue" font-family="Helvetica, Arial, sans-serif" font-size="14" fill="#222222">'
    )
    marker = (
        '<defs><marker id="head" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="7" markerHeight="7" orient="auto">'
        '<path d="M 0 0 L 10 5 L 0 10 z" fill="#222222"/></marker></defs>'
    )
    return '\n'.join([head, marker, '<rect width="845" height="320" fill="white"/>', *parts, '</svg>', ''])


if __name__ == '__main__':
    argparse.ArgumentParser(description=__doc__).parse_args()
    Path(__file__).with_name('c2l.svg').write_text(diagram(), encoding='utf-8')
