"""``moejax report``: one self-contained HTML file on a run, a set of runs or an ablation.

    command          flags, checks, the files written
    gather           what is read from folders
    shapes           what a file has to hold before it is shown
    curves           metrics.jsonl at the resolution of a figure
    charts           what figures show
    svg              figures within the page
    files            the same as PNG and SVG files, by matplotlib
    learning         charts of loss
    routing          charts of routers
    evaluation       tables of held-out text by domain and of tasks
    ablation_charts  charts of an ablation
    run_page, set_page, ablation_page    their sections
    money            the bill
    card             model card, commands, versions
    warnings         what a reader has to know first
    page, style, html    the page round it

Every text from configs, corpora and errors is escaped (``html``), the page forbids scripts and
loads (``page``), and its themes are the style sheet's alone (``style``).
"""
