"""After a volume's whole cycle the CHAP password and the API token stand nowhere but where they must."""
