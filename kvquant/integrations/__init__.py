"""kvquant inside other libraries; each module imports its library, and is imported by whoever uses it."""
