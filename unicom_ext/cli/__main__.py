from unicom_ext.cli.main import main

main(prog_name="unicom-ext")
