"""The reader of SASS, on small listings as `cuobjdump -sass` prints them."""

from longtake.bench.sass import Instruction, count, instructions, loops, order


def listing(*code: str) -> str:
    """Instructions 16 bytes apart, each with its encoding, as the disassembler prints them."""
    encoding = "/* 0x0000000000007919 */"
    lines = [
        f"        /*{16 * i:04x}*/         {text} ;     {encoding}\n     {encoding}" for i, text in enumerate(code)
    ]
    return "\tcode for sm_90a\n\t\tFunction : forward_kernel\n" + "\n".join(lines) + "\n"


def test_an_instruction_is_read_with_its_guard_and_target() -> None:
    code = instructions(
        listing("S2R R0, SR_TID.X", "@!P0 BRA 0x9d70", "@UP1 UTMALDG.3D [UR8], [UR4], desc[URZ]", "EXIT")
    )
    assert code == [
        Instruction(0x00, "S2R", "R0, SR_TID.X", False),
        Instruction(0x10, "BRA", "0x9d70", True),
        Instruction(0x20, "UTMALDG.3D", "[UR8], [UR4], desc[URZ]", True),
        Instruction(0x30, "EXIT", "", False),
    ]
    assert [x.target for x in code] == [None, 0x9D70, None, None]


def test_a_name_counts_with_its_modifiers_and_not_as_a_part_of_another() -> None:
    code = instructions(
        listing("HGMMA.64x128x16.F32.BF16 R24, R4", "HMMA.16816.F32 R0, R1", "LDL.LU R3, [R1]", "LDLX R3")
    )
    assert [count(code, name) for name in ("HGMMA", "HMMA", "LDL", "UTMALDG")] == [1, 1, 1, 0]


def test_groups_waits_exponentials_and_barriers_make_the_order() -> None:
    code = listing(
        "WARPGROUP.ARRIVE",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8]",
        "UIADD3 UR4, UR5, 0x2, URZ",
        "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR12], gsb0",
        "WARPGROUP.ARRIVE",
        "HGMMA.64x128x16.F32.BF16 R88, R4, gdesc[UR8]",
        "WARPGROUP.DEPBAR.LE gsb0, 0x1",
        "BAR.SYNC.DEFER_BLOCKING 0x2, 0x80",
        "MUFU.EX2 R3, R4",
        "FADD R3, R3, R4",
        "MUFU.EX2 R5, R6",
        "MUFU.RCP R5, R6",
        "BAR.SYNC.DEFER_BLOCKING 0x0",
        "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    )
    assert order(instructions(code)) == "H2 H1 W1 b E2 B W0"


def test_of_synchronous_products_the_counts_are_told() -> None:
    code = ("HMMA.16816.F32 R0, R1", "MUFU.EX2 R3, R4", "HMMA.16816.F32 R0, R1", "BAR.SYNC.DEFER_BLOCKING 0x0")
    assert order(instructions(listing(*code))) == "M2 E1 B1"


NESTED = (
    "S2R R0, SR_TID.X",
    "IADD3 R1, R1, 0x1",  # 0x10: outer loop
    "WARPGROUP.ARRIVE",  # 0x20: inner loop
    "HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], gsb0",
    "WARPGROUP.DEPBAR.LE gsb0, 0x0",
    "@P1 BRA 0x90",  # 0x50: over the mask
    "ISETP.GE.AND P2, PT, R3, R4, PT",
    "FSEL R5, R5, -INF , P2",
    "STL [R1], R5",
    "MUFU.EX2 R5, R5",  # 0x90
    "@P0 BRA 0x20",
    "@P3 BRA 0x10",
    "LDL R5, [R1]",
    "EXIT",
    "SYNCS.PHASECHK.TRANS64.TRYWAIT P0, [UR4], R4",  # out of line: spins, then goes back into the loop
    "@!P0 BRA 0xe0",
    "BRA 0x20",
)


def test_the_innermost_loop_is_found_and_its_unmasked_turn_measured() -> None:
    [loop] = loops(instructions(listing(*NESTED)))
    assert (loop.length, loop.order, loop.local) == (9 - 3, "H1 W0 E1", 1)


def test_loops_come_by_address() -> None:
    one = ("WARPGROUP.ARRIVE", "HGMMA.64x8x16.F32 R24, gdesc[UR8]")
    code = (*one, "@P0 BRA 0x0", *one, "NOP", "@P0 BRA 0x30", "EXIT")
    assert [loop.length for loop in loops(instructions(listing(*code)))] == [3, 4]


def test_a_loop_without_products_is_found_by_its_exponentials_among_others() -> None:
    code = ("IADD3 R1, R1, 0x1", "@P0 BRA 0x0", "MUFU.EX2 R5, R5", "@P0 BRA 0x20", "EXIT")
    assert [(loop.length, loop.order) for loop in loops(instructions(listing(*code)))] == [(2, "E1")]


def test_a_kernel_without_either_has_none() -> None:
    assert loops(instructions(listing("IADD3 R1, R1, 0x1", "@P0 BRA 0x0", "EXIT"))) == []
