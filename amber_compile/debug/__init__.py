"""What sparsity changes, where, and how to show it to others.

check                 the error of every site and of the output, dense and sparse side by side
bisect                which step of the compilation and which site cause an error above a bound
reproducer            a report as a script that needs neither the model nor its weights
"""
