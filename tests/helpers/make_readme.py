"""README.md from nbs/index.ipynb: python tests/helpers/make_readme.py [FOLDER]

The links of the notebook are relative to nbs/, those of README to the root.
"""
import re, sys
from pathlib import Path
from nbconvert import MarkdownExporter
from nbconvert.preprocessors import RegexRemovePreprocessor

ROOT = Path(__file__).resolve().parents[2]

def readme():
    "The text of README.md"
    hidden = RegexRemovePreprocessor(enabled=True, patterns=[r'#\| hide'])
    exporter = MarkdownExporter()
    exporter.register_preprocessor(hidden, enabled=True)
    text, _ = exporter.from_filename(str(ROOT/'nbs'/'index.ipynb'))
    return re.sub(r'\]\((?=[\w/]+\.ipynb\)|images/)', '](nbs/', text)

if __name__ == '__main__':
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT
    (folder/'README.md').write_text(readme(), encoding='utf-8')
