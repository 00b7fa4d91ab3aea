"`python command.py pretrain --epochs 2 …`: a command of the package where the package is not installed"
import importlib, sys

main = importlib.import_module(f'c2l_nb.tasks.{sys.argv.pop(1)}').main
main()
