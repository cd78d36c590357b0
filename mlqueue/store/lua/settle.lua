#!lua flags=allow-oom
-- ARGV: one packed settle each. Returns refusals, flat: position, text.
return settle(1, #ARGV)
