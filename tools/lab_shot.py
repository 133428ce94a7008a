"""Picture a notebook, as OUT-0.png, OUT-1.png and so on:

python -m tools.lab_shot NOTEBOOK OUT.png [--dark] [--no-run] [--unfold]

The notebook is run first. Sections and sources are then folded as a learner sees them after "Run
all", and answers to predictions are open. With --no-run the stored notebook is pictured, all folds
closed; with --unfold everything is open.
"""

import argparse
from pathlib import Path

from tools.lab import open_lab


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tools.lab_shot")
    parser.add_argument("notebook", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--dark", action="store_true", help="in JupyterLab's dark theme")
    parser.add_argument("--no-run", action="store_true", help="with the stored outputs")
    parser.add_argument("--unfold", action="store_true", help="with everything open")
    args = parser.parse_args()
    with open_lab(args.notebook, dark=args.dark) as lab:
        if not args.no_run:
            lab.run_all()
        if args.unfold:
            lab.unfold()
        lab.screenshots(args.picture)
        print("execution counts", [c["count"] for c in lab.cells() if c["type"] == "code"])


if __name__ == "__main__":
    main()
