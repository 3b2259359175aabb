def write_page(lines):
    pass
