"""What people see: tables, progress, heat maps."""
