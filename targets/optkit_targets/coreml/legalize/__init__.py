"""Passes that only Core ML needs: forms that the Apple Neural Engine runs well."""
