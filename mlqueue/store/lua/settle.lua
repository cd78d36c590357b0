#!lua flags=allow-oom
-- parts: queue moves create ends history progress settle
-- ARGV: one packed settle each. Returns refusals, flat: position, text.
return settle(1, #ARGV)
