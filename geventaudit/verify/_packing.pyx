# cython: language_level=3, boundscheck=False, wraparound=False, initializedcheck=False, infer_types=False
"""The stamp and the canonical form of a record that a JSON parser has read, each in one walk over it.

The walks only say "this is it" or "not sure": the code in Python decides on the rest, and says the reasons. A parser's
values are of the exact types of JSON, and nothing else holds them.
"""

from cpython.bytes cimport PyBytes_FromStringAndSize
from cpython.dict cimport PyDict_GetItemWithError
from cpython.mem cimport PyMem_Free, PyMem_Realloc
from cpython.object cimport PyObject
from libc.string cimport memcpy

from ..records import CallerIdentityType
from ..schema.json_safe import MAX_SAFE_INTEGER
from ..trail.canonical import BODY_KEYS

__all__ = ["canonical_or_none", "plain_stamp"]

cdef extern from "Python.h":
    const char* PyUnicode_AsUTF8AndSize(object text, Py_ssize_t* size) except NULL
    int PyUnicode_Compare(object one, object other) except? -1
    long long PyLong_AsLongLongAndOverflow(object number, int* overflow) except? -1

cdef enum:
    MAX_DEPTH = 100
    FIELDS = 14
    IDENTITIES = 2
    CUSTOM = 4
    TARGETS = 5
    MAX_PATH = 16

cdef struct Buffer:
    char* data
    Py_ssize_t size
    Py_ssize_t room

cdef class NotSure(Exception):
    """The body has a value that is for the code in Python."""

cdef tuple KEYS = BODY_KEYS
if len(KEYS) != FIELDS or (KEYS[IDENTITIES], KEYS[CUSTOM], KEYS[TARGETS]) != (
    "CallerIdentities", "CustomData", "TargetResources"
):
    raise ImportError("geventaudit.verify._packing: the keys of a body have other places")
cdef frozenset KINDS = frozenset([kind.value for kind in CallerIdentityType])
cdef tuple IDENTITY_KEYS = ("Identity", "Description")
cdef long long MAX_SAFE = MAX_SAFE_INTEGER


cdef int put(Buffer* out, const char* data, Py_ssize_t size) except -1:
    cdef Py_ssize_t room
    cdef char* larger
    if out.size + size > out.room:
        room = (out.size + size) * 2 + 1024
        larger = <char*>PyMem_Realloc(out.data, room)
        if larger is NULL:
            raise MemoryError
        out.data, out.room = larger, room
    memcpy(out.data + out.size, data, size)
    out.size += size
    return 0


cdef int put_number(Buffer* out, int code, unsigned long long value, int size) except -1:
    """Write a code and a big-endian number of so many bytes."""
    cdef unsigned char data[9]
    cdef int place
    data[0] = <unsigned char>code
    for place in range(size):
        data[size - place] = <unsigned char>(value >> (8 * place))
    return put(out, <const char*>data, size + 1)


cdef int put_header(Buffer* out, Py_ssize_t size, int few, int most, int byte, int word) except -1:
    """Write the shortest header of a text, an array or a map. Only texts have one with a byte for the size."""
    if size < most:
        return put_number(out, few | <int>size, 0, 0)
    if byte and size < 0x100:
        return put_number(out, byte, size, 1)
    if size < 0x10000:
        return put_number(out, word, size, 2)
    return put_number(out, word + 1, size, 4)


cdef int put_text(Buffer* out, object text) except -1:
    cdef Py_ssize_t size
    cdef const char* data = PyUnicode_AsUTF8AndSize(text, &size)
    put_header(out, size, 0xA0, 32, 0xD9, 0xDA)
    return put(out, data, size)


cdef int put_integer(Buffer* out, object number) except -1:
    cdef int overflow = 0
    cdef long long value = PyLong_AsLongLongAndOverflow(number, &overflow)
    if overflow or value > MAX_SAFE or value < -MAX_SAFE:
        raise NotSure
    if -32 <= value < 128:
        return put_number(out, <int>(value & 0xFF), 0, 0)
    if value >= 0:
        if value < 0x100:
            return put_number(out, 0xCC, value, 1)
        if value < 0x10000:
            return put_number(out, 0xCD, value, 2)
        if value < 0x100000000:
            return put_number(out, 0xCE, value, 4)
        return put_number(out, 0xCF, value, 8)
    if value >= -0x80:
        return put_number(out, 0xD0, <unsigned long long>value, 1)
    if value >= -0x8000:
        return put_number(out, 0xD1, <unsigned long long>value, 2)
    if value >= -0x80000000LL:
        return put_number(out, 0xD2, <unsigned long long>value, 4)
    return put_number(out, 0xD3, <unsigned long long>value, 8)


cdef bint is_sorted(dict values) except -1:
    cdef object before = None
    for key in values:
        if before is not None and PyUnicode_Compare(before, key) >= 0:
            return False
        before = key
    return True


cdef int put_map(Buffer* out, dict values, int depth) except -1:
    """Write a map, sorted by code point."""
    put_header(out, len(values), 0x80, 16, 0, 0xDE)
    if is_sorted(values):
        for key, each in values.items():
            put_text(out, key)
            put_value(out, each, depth)
    else:
        for key in sorted(values):
            put_text(out, key)
            put_value(out, values[key], depth)
    return 0


cdef int put_value(Buffer* out, object value, int depth) except -1:
    cdef type kind = type(value)
    if kind is str:
        return put_text(out, value)
    if kind is dict or kind is list:
        if depth == 0:
            raise NotSure
        if kind is dict:
            return put_map(out, <dict>value, depth - 1)
        put_header(out, len(<list>value), 0x90, 16, 0, 0xDC)
        for each in <list>value:
            put_value(out, each, depth - 1)
        return 0
    if kind is int:
        return put_integer(out, value)
    if value is None:
        return put_number(out, 0xC0, 0, 0)
    if kind is bool:
        return put_number(out, 0xC3 if value else 0xC2, 0, 0)
    raise NotSure


cdef int put_identities(Buffer* out, dict groups) except -1:
    """Write the identities of callers, of one kind. The code in Python knows the order of the kinds."""
    cdef dict identity
    if len(groups) != 1:
        raise NotSure
    put_header(out, 1, 0x80, 16, 0, 0xDE)
    for kind, group in groups.items():
        if type(kind) is not str or type(group) is not list or kind not in KINDS:
            raise NotSure
        put_text(out, kind)
        put_header(out, len(<list>group), 0x90, 16, 0, 0xDC)
        for each in <list>group:
            if type(each) is not dict or len(<dict>each) != 2:
                raise NotSure
            identity = <dict>each
            put_header(out, 2, 0x80, 16, 0, 0xDE)
            for name in IDENTITY_KEYS:
                value = identity.get(name)
                if type(value) is not str:
                    raise NotSure
                put_text(out, name)
                put_text(out, value)
    return 0


cdef int put_body(Buffer* out, dict body) except -1:
    cdef PyObject* fields[FIELDS]
    cdef int place, there = 0
    for place in range(FIELDS):
        fields[place] = PyDict_GetItemWithError(body, KEYS[place])
        there += fields[place] is not NULL
    put_header(out, there, 0x80, 16, 0, 0xDE)
    for place in range(FIELDS):
        if fields[place] is NULL:
            continue
        value = <object>fields[place]
        put_text(out, KEYS[place])
        if type(value) is not dict:
            if place == IDENTITIES:
                raise NotSure
            put_value(out, value, 1)
        elif place == CUSTOM or place == TARGETS:
            put_map(out, <dict>value, MAX_DEPTH)
        elif place == IDENTITIES:
            put_identities(out, <dict>value)
        else:
            raise NotSure
    return 0


def canonical_or_none(body):
    cdef Buffer out
    if type(body) is not dict:
        return None
    out.data, out.size, out.room = NULL, 0, 0
    try:
        put_body(&out, <dict>body)
        return PyBytes_FromStringAndSize(out.data, out.size)
    except (NotSure, UnicodeEncodeError):
        return None
    finally:
        PyMem_Free(out.data)


cdef int digit_of(char digit) noexcept:
    """Return the value of a lower-case hexadecimal digit, or -1."""
    if c"0" <= digit <= c"9":
        return digit - c"0"
    return digit - c"a" + 10 if c"a" <= digit <= c"f" else -1


cdef const char* text_in(dict stamp, object key, Py_ssize_t* size) except? NULL:
    """Return the text of a stamp, or NULL if there is none."""
    cdef PyObject* value = PyDict_GetItemWithError(stamp, key)
    if value is NULL or type(<object>value) is not str:
        return NULL
    return PyUnicode_AsUTF8AndSize(<object>value, size)


cdef object mac_of(const char* digits, Py_ssize_t size):
    """Return the bytes of a MAC, or None."""
    cdef char mac[32]
    cdef int place, high, low
    if digits is NULL or size != 64:
        return None
    for place in range(32):
        high, low = digit_of(digits[2 * place]), digit_of(digits[2 * place + 1])
        if high < 0 or low < 0:
            return None
        mac[place] = <char>(high << 4 | low)
    return PyBytes_FromStringAndSize(mac, 32)


cdef bint is_time(const char* text, Py_ssize_t size) noexcept:
    cdef const char* form = "0000-00-00T00:00:00.000000Z"
    cdef int place
    if text is NULL or size != 27:
        return False
    for place in range(27):
        if not (c"0" <= text[place] <= c"9" if form[place] == c"0" else text[place] == form[place]):
            return False
    return True


cdef bint is_stream(const char* text, Py_ssize_t size) noexcept:
    cdef Py_ssize_t place
    cdef int numbers = 0, digits = 1
    if text is NULL or size < 32:
        return False
    for place in range(32):
        if digit_of(text[place]) < 0:
            return False
    for place in range(32, size):
        if text[place] == c"/":
            numbers, digits = numbers + 1 if digits else MAX_PATH + 1, 0
        else:
            digits += 1
            if numbers == 0 or digits > 16 or not c"0" <= text[place] <= c"9":
                return False
    return numbers <= MAX_PATH and digits > 0


def plain_stamp(stamp):
    cdef Py_ssize_t size = 0, time_size = 0
    cdef const char* text
    cdef int overflow = 0
    cdef PyObject* seq
    if type(stamp) is not dict or len(<dict>stamp) != 5:
        return None
    try:
        seq = PyDict_GetItemWithError(<dict>stamp, "seq")
        if seq is NULL or type(<object>seq) is not int or text_in(<dict>stamp, "tag", &size) is NULL:
            return None
        if not 1 <= PyLong_AsLongLongAndOverflow(<object>seq, &overflow) <= MAX_SAFE:  # -1 if it is too large
            return None
        text = text_in(<dict>stamp, "stream", &size)
        if not is_stream(text, size):
            return None
        mac = mac_of(text_in(<dict>stamp, "mac", &size), size)
        text = text_in(<dict>stamp, "time", &time_size)
        if mac is None or not is_time(text, time_size):
            return None
    except UnicodeEncodeError:
        return None
    return (<dict>stamp)["stream"], <object>seq, PyBytes_FromStringAndSize(text, 27), mac
