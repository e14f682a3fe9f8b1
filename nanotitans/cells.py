"""
An evaluation that is a grid of cells: each cell is saved as soon as it is computed, so that Ctrl-C
loses only the unfinished one. eval_needle.py and eval_babi.py are made of this.
"""
import hashlib
import json
import math
import os
import sys

from tqdm import tqdm

from nanotitans.configurator import UserError
from nanotitans.files import save_json


class EvaluationSet:
    """
    The evaluation set that `prepare.py made_by` wrote: a haystack, and lists of samples of these
    names; a sample has such an entry. UserError if it is missing or damaged.
    """

    def __init__(self, folder, made_by, names, entry):
        remedy = f"; run: python prepare.py {made_by}"
        try:
            with open(os.path.join(folder, 'eval.json'), encoding='utf-8') as f:
                content = f.read()
            self.samples, self.text = (json.loads(content)[key] for key in ('samples', 'haystack'))
            if not (isinstance(self.text, str) and self.samples.keys() >= set(names)
                    and all(isinstance(samples, list) and entry in samples[0]
                            for samples in self.samples.values())):
                raise ValueError
        except OSError:
            raise UserError(f"{folder}: no evaluation set here{remedy}") from None
        except (ValueError, LookupError, TypeError, AttributeError):
            raise UserError(f"{folder}/eval.json is damaged, or of an older version{remedy}"
                            ) from None
        self.sha256 = hashlib.sha256(content.encode()).hexdigest()

    def check_samples(self, samples):
        """UserError if a list has fewer samples than that."""
        available = min(map(len, self.samples.values()))
        if samples > available:
            raise UserError(f"samples={samples}: the evaluation set has {available} of each task")


def interval(right, n, z=1.96):
    """Wilson's 95% confidence interval of the proportion right / n."""
    p, scale = right / n, 1 + z * z / n
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n)) / scale
    middle = (p + z * z / (2 * n)) / scale
    return [round(max(middle - half, 0), 4), round(min(middle + half, 1), 4)]


class Results:
    """The finished cells of a file whose checkpoint and samples have not changed."""

    def __init__(self, path, sources):
        self.path, self.sources, self.cells = path, sources, []
        try:
            with open(path, encoding='utf-8') as f:
                content = json.load(f)
            if content['sources']['evaluation'] == sources['evaluation']:
                self.sources = content['sources'] | sources
                self.cells = [cell for cell in content['cells']
                              if content['sources'][cell['model']] == self.sources[cell['model']]]
        except FileNotFoundError:
            pass
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is damaged; move it away to start again") from None

    def find(self, cell):
        """The saved cell that has all entries of `cell`, or None."""
        return next((saved for saved in self.cells if cell.items() <= saved.items()), None)

    def add(self, cell):
        """Add a cell and save the file at once, with an atomic write."""
        self.cells.append(cell)
        save_json(self.path, {'sources': self.sources, 'cells': self.cells}, indent=1)

    def fill(self, grid, measure, title):
        """
        Compute the cells of the grid that are not there yet: measure(cell, tick) -> its scores.
        tick() takes the number of tokens read; the progress bar shows title(cell). -> all cells of
        the grid, or None if Ctrl-C came, after a line that says how to go on
        """
        todo = [cell for cell in grid if not self.find(cell)]
        total = sum(cell['samples'] * cell['length'] for cell in todo)
        try:
            with tqdm(total=total, unit='tok', unit_scale=True, disable=not todo) as bar:
                for cell in todo:
                    bar.set_description(title(cell))
                    self.add(cell | measure(cell, bar.update))
        except KeyboardInterrupt:
            print(f"\nstopped; {self.path} has {len(self.cells)} finished cells, "
                  "the same command continues", file=sys.stderr)
            return None
        return [self.find(cell) for cell in grid]
