"""Records in, batches out; the tokenizer; the embedded world.

Entry points: `records.read_records`, `batches`, `tokenizer.Tokenizer`, `helpdesk`.

May be imported by: everything but kernels. Imports: `checks`, `seeds`, `devices`.
"""
