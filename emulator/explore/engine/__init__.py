"""A controlled scheduler and its search; knows no KVM."""
