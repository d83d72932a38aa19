// Entry by PVH and by the Linux 64-bit protocol, the static processor tables,
// and all code that ever runs in ring 0.
//
// Ring 0 is kept as short as possible: there are hosts whose KVM emulates each
// privileged instruction, and everything here runs once or once an interrupt.
// All tables are data made by the assembler, so that nothing is computed at boot.

.set CPU, 0x100000              // link.ld: .cpu
.set VECTORS, 0x104000          // link.ld: .vectors
.set KERNEL_CS, 0x08
.set USER_DS, 0x1b
.set USER_CS, 0x23
.set TSS_SELECTOR, 0x28
.set LAPIC_EOI, 0xfee000b0
.set COM1, 0x3f8

// Present, writable, user, accessed, dirty; with and without "large page".
.set TABLE, 0x67
.set LARGE, 0xe7

// --- tables -----------------------------------------------------------------
.section .cpu, "aw", @progbits
.balign 4096
cpu_start:
idt:
.set vector, 0
.rept 256
    .set entry, VECTORS + vector * 16
    .set gate, 0x8e00                           // interrupt gate, DPL 0
    .if vector == 8
        .set gate, 0x8e01                       // double fault: IST1
    .endif
    .word entry & 0xffff, KERNEL_CS, gate, entry >> 16
    .long 0, 0
    .set vector, vector + 1
.endr

// The TSS lets ring 3 use every port: its I/O bitmap is all zero and the limit
// lies past its end.
.global tss
tss:
    .long 0
    .quad ring0_stack_top                       // rsp0
    .quad 0, 0, 0
    .quad fault_stack_top                       // ist1
    .quad 0, 0, 0, 0, 0, 0, 0
    .quad 0
    .word 0
    .word 104                                   // bitmap offset
    .zero 8192
    .byte 0xff
tss_end:

.balign 16
.global gdt
gdt:
    .quad 0
    .quad 0x00af9b000000ffff                    // 0x08 ring-0 code, 64 bit
    .quad 0x00cf93000000ffff                    // 0x10 ring-0 data
    .quad 0x00cff3000000ffff                    // 0x18 ring-3 data
    .quad 0x00affb000000ffff                    // 0x20 ring-3 code, 64 bit
    .set TSS, CPU + 4096
    .set TSS_LIMIT, 104 + 8192
    .quad (TSS_LIMIT & 0xffff) | ((TSS & 0xffffff) << 16) | (0x89 << 40) | ((TSS >> 24) << 56)
    .quad 0
    .quad 0x00cf9b000000ffff                    // 0x38 ring-0 code, 32 bit: other processors' way
    .zero 16 * {max_others}                     // 0x40 their TSSs, filled by smp.rs
gdt_end:

.balign 8
gdt_pointer:
    .word gdt_end - gdt - 1
    .quad gdt
.balign 8
idt_pointer:
    .word 4095
    .quad idt
.balign 8
no_idt_pointer:
    .word 0
    .quad 0

// Identity map of the low 4 GiB in 2 MiB pages, open to ring 3. memory.rs adds
// what lies above.
.section .data.tables, "aw", @progbits
.balign 4096
.global pml4
pml4:
    .quad pdpt + TABLE
    .zero 4096 - 8
.global pdpt
pdpt:
    .quad page_directories + TABLE
    .quad page_directories + 0x1000 + TABLE
    .quad page_directories + 0x2000 + TABLE
    .quad page_directories + 0x3000 + TABLE
    .zero 4096 - 32
page_directories:
.set page, 0
.rept 2048
    .quad page + LARGE
    .set page, page + 0x200000
.endr

// --- interrupt entry points ---------------------------------------------------
.section .vectors, "ax", @progbits
.code64
.set vector, 0
.rept 256
    .balign 16
    .if vector == 6
        jmp gates
    .elseif vector == {nap_vector}
        jmp nap_over
    .elseif vector == 0xff
        iretq                                   // spurious: no EOI
    .elseif vector >= 0x20
        push rax
        mov eax, vector
        jmp interrupt
    .elseif vector == 8 || (vector >= 10 && vector <= 14) || vector == 17 || vector == 21
        push vector                             // above the error code
        jmp fault
    .else
        push 0
        push vector
        jmp fault
    .endif
    .set vector, vector + 1
.endr
.balign 4096

.section .boot, "ax", @progbits
// A device's interrupt: note it, end it. Ring 3 does the work.
interrupt:
    mov byte ptr [rax + {pending}], 1
    mov byte ptr [{woken}], 1
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
    iretq

// The end of another processor's nap: nothing of it concerns the first one.
nap_over:
    push rax
    mov eax, LAPIC_EOI
    mov dword ptr [rax], 0
    pop rax
    iretq

// What ring 3 asks of ring 0 comes as ud2 with a number in eax: not every KVM
// that emulates ring 0 knows the int instruction. The numbers are in cpu.rs;
// an honest ud2 has another value there.
gates:
    cmp eax, {gate_idle}
    jne 3f
    // Sleep until an interrupt, unless one came since the last return from
    // here: interrupts are off between the test and the halt.
    add qword ptr [rsp], 2
    cmp byte ptr [{woken}], 0
    jne 2f
    sti
    hlt
    cli
2:  mov byte ptr [{woken}], 0
    iretq
3:  cmp eax, {gate_enable}
    jne 4f
    // Ring 3 can't set IF: set it in the frame that it returns by.
    add qword ptr [rsp], 2
    or dword ptr [rsp + 16], 0x200
    iretq
4:  cmp eax, {gate_triple_fault}
    jne 5f
    lidt [no_idt_pointer]
    ud2
5:  cmp eax, {gate_stop}
    jne 7f
6:  cli
    hlt
    jmp 6b
7:  cmp eax, {gate_nap}
    jne 8f
    // Another processor's sleep. Ring 3 runs there with interrupts off, so that none is missed.
    add qword ptr [rsp], 2
    sti
    hlt
    cli
    iretq
8:  push 0
    push 6
    jmp fault

// An exception ends the run: report it from ring 3, on a stack of its own.
// Stack: vector, error code, rip, cs, rflags, rsp, ss.
fault:
    pop rdi
    pop rsi
    mov rdx, [rsp]
    mov rcx, cr2
    mov r8, [rsp + 24]
    mov rsp, offset fault_stack_top
    push USER_DS
    push offset report_stack_top - 8
    push 2
    push USER_CS
    push offset {report}
    iretq

.section .note.pvh, "a", @note
.balign 4
    .long 4, 8, 18                              // XEN_ELFNOTE_PHYS32_ENTRY
    .asciz "Xen"
    .quad pvh_entry

.section .boot, "ax", @progbits
// --- entry ---------------------------------------------------------------------
// PVH: 32-bit protected mode without paging, ebx = start_info.
.code32
.global pvh_entry
pvh_entry:
    cli
    mov edx, COM1
    mov al, 'o'                                 // the ready line's first byte
    out dx, al
    mov esi, ebx
    xor edi, edi
    lgdt [gdt_pointer]
    mov eax, 0x620                              // PAE, OSFXSR, OSXMMEXCPT
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080                         // EFER
    rdmsr
    or eax, 0x100                               // LME
    wrmsr
    mov eax, 0x80010033                         // PG, WP, NE, ET, MP, PE
    mov cr0, eax
    ljmp KERNEL_CS, offset to_ring3

// Linux 64-bit protocol: long mode, this image mapped to itself, rsi = boot_params.
.code64
.global linux_entry
linux_entry:
    cli
    mov edx, COM1
    mov al, 'o'
    out dx, al
    mov edi, 1
    lgdt [gdt_pointer]
    mov eax, 0x620
    mov cr4, rax
    mov eax, offset pml4
    mov cr3, rax
    mov eax, 0x80010033
    mov cr0, rax

to_ring3:
    cld
    lidt [idt_pointer]
    mov eax, TSS_SELECTOR
    ltr ax
    mov eax, USER_DS
    mov ds, eax
    mov es, eax
    mov rsp, offset ring0_stack_top
    push USER_DS
    push offset user_stack_top - 8
    push 2                                      // interrupts off
    push USER_CS
    push offset {main}
    iretq

// --- other processors ---------------------------------------------------------------
// smp.rs copies this to a page below 1 MiB: real mode, cs:0 is its start.
.code16
.balign 64
.global trampoline
trampoline:
    cli
    lgdt cs:[64]
    mov eax, 0x11                               // ET, PE
    mov cr0, eax
    .byte 0x66, 0xea                            // ljmp 0x38:other_entry with a 32-bit offset
    .long other_entry
    .word 0x38
.balign 64
    .word gdt_end - gdt - 1
    .long gdt
.global trampoline_end
trampoline_end:

.code32
other_entry:
    mov eax, 0x10
    mov ds, eax
    mov ss, eax
    mov eax, 0x620
    mov cr4, eax
    mov eax, offset pml4
    mov cr3, eax
    mov ecx, 0xc0000080
    rdmsr
    or eax, 0x100
    wrmsr
    mov eax, 0x80010033
    mov cr0, eax
    ljmp KERNEL_CS, offset other_long

.code64
other_long:
    lidt [idt_pointer]
    mov edi, 1
    lock xadd dword ptr [{others}], edi         // which one this is, from 0
    cmp edi, {max_others}
    jae 9f
    mov eax, edi
    shl eax, 4
    add eax, 0x40
    ltr ax
    mov eax, USER_DS
    mov ds, eax
    mov es, eax
    lea ecx, [edi + 1]
    shl ecx, 9                                  // ring-0 stacks of 512 bytes
    lea rsp, [rcx + {other_ring0_stacks}]
    lea ecx, [edi + 1]
    shl ecx, 12                                 // ring-3 stacks of 4 KiB
    lea rax, [rcx + {other_stacks} - 8]
    push USER_DS
    push rax
    push 2
    push USER_CS
    push offset {other_main}
    iretq
9:  cli                                         // more than there are places for
    hlt
    jmp 9b

// --- stacks ----------------------------------------------------------------------
// In .bss.hot: the pages that every turn of the main loop writes lie together.
.section .bss.hot, "aw", @nobits
.balign 4096
    .zero 1024
ring0_stack_top:
    .zero 1024
fault_stack_top:
.section .bss.stacks, "aw", @nobits
.balign 4096
    .zero 16384
report_stack_top:
    .zero 524288                                // the whole pilot lies here, and moves there once
user_stack_top:
