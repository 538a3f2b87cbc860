package fcluster.benchmarks;

import org.apache.flink.api.common.serialization.SerializationSchema;
import org.apache.flink.types.Row;

/**
 * One column of a row, its bytes as they are. PyFlink's own schemas write whole rows, but a record of Kafka has a key
 * and a value, which the schemas of a sink both take from the same row.
 */
public final class Column implements SerializationSchema<Row> {
    private static final long serialVersionUID = 1L;

    private final int number;

    public Column(int number) {
        this.number = number;
    }

    @Override
    public byte[] serialize(Row row) {
        return (byte[]) row.getField(number);
    }
}
