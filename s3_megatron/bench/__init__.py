"""What a step costs, measured on the machine at hand and printed with what it is to be compared with."""
