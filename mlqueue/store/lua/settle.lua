#!lua flags=allow-oom
-- parts: events counts queue limits moves create hooks ends cancel unique history progress settle
-- ARGV: one packed settle each. Returns refusals, flat: position, text.
local refused = settle(1, #ARGV)
write_counts()
return refused
