"""What tests share; README.md says what is where."""
